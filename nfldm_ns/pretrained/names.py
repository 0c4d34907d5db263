"""Names of pretrained weights, for commands that only name them."""

from typing import Literal

WeightsName = Literal["lpips-vgg", "lpips-alex", "fid-inception", "i3d-kinetics-400"]
