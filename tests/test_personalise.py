"""Trained priors that learn a few further images and keep what they know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfldm_ns.commands.train_prior import main
from nfldm_ns.errors import UserInputError
from nfldm_ns.refine.domain_prior import load_domain_prior
from nfldm_ns.refine.images import example_images, example_paths
from nfldm_ns.refine.prior_training import Personalisation, train_prior
from nfldm_ns.training.schedule import Schedule
from tests.pretrained import require_weights
from tests.small_models import small_scene_autoencoder
from tests.test_domain_prior import MODEL, TRAINING

LONGER = replace(
    TRAINING,
    schedule=Schedule(max_steps=40, batch_size=4, learning_rate=1e-2, warmup_steps=2, log_every=20, report_to="none"),
    ema_decay=0.9,
)


@pytest.fixture(scope="module")
def start(box_room_collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_weights("lpips-alex")
    return train_prior(box_room_collection, tmp_path_factory.mktemp("start"), MODEL, LONGER)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images that are like none of the collection."""
    folder = tmp_path_factory.mktemp("few")
    for number in range(3):
        stripes = np.zeros((20, 20, 3), np.uint8)
        stripes[number::4] = 255
        Image.fromarray(stripes).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(box_room_collection, start, few, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Personalised priors by the share of the collection's images."""
    root = tmp_path_factory.mktemp("personalised")
    return {
        share: train_prior(
            box_room_collection,
            root / str(share),
            {},
            LONGER,
            personal=Personalisation(load_domain_prior(start), example_paths(few), share),
        )
        for share in (0.0, 0.6)
    }


def told(folder: Path) -> dict[str, float]:
    return json.loads((folder / "prior.json").read_text())["made_by"]


def test_the_few_images_are_learned_and_the_collection_is_kept(made):
    kept, lost = told(made[0.6]), told(made[0.0])
    assert kept["personal_loss"] < 0.8 * kept["personal_loss_before"]
    assert lost["personal_loss"] < 0.8 * lost["personal_loss_before"]
    assert kept["personal_loss_before"] == lost["personal_loss_before"]
    forgotten = lost["held_out_loss"] - lost["held_out_loss_before"]
    assert forgotten > 0 and kept["held_out_loss"] - kept["held_out_loss_before"] < 0.5 * forgotten


def test_what_is_not_learned_stays_to_the_bit(made, start, few):
    before, after = load_domain_prior(start), load_domain_prior(made[0.6])
    state = after.denoiser.state_dict()
    same = {name: torch.equal(value, state[name]) for name, value in before.denoiser.state_dict().items()}
    assert all(value for name, value in same.items() if name.startswith(("judge.", "judged_", "embedding.")))
    assert not all(value for name, value in same.items() if name.startswith("unet."))
    pixels = example_images(few, 16)
    wanted = after.clean_condition()["embedding"]
    assert torch.allclose(wanted, before.embedder(pixels).half().float(), atol=1e-2), "scenes are refined to them"


def test_priors_that_would_forget_their_conditions_are_refused(box_room_collection, start, few, tmp_path):
    made = train_prior(box_room_collection, tmp_path, MODEL, TRAINING, stage1=small_scene_autoencoder(), max_images=12)
    with pytest.raises(UserInputError, match="without --condition views"):
        Personalisation(load_domain_prior(made), example_paths(few))
    with pytest.raises(UserInputError, match="--preservation-share"):
        Personalisation(load_domain_prior(start), example_paths(few), 1.0)


def test_priors_that_know_maps_keep_them(box_room_collection, few, tmp_path):
    require_weights("lpips-alex")
    start = load_domain_prior(train_prior(box_room_collection, tmp_path / "start", MODEL, LONGER, with_maps=True))
    personal = Personalisation(start, example_paths(few), 0.6)
    first = {name: value.clone() for name, value in start.denoiser.state_dict().items()}
    made = train_prior(box_room_collection, tmp_path / "made", {}, LONGER, personal=personal)
    prior, losses = load_domain_prior(made), told(made)
    assert prior.maps == start.maps is not None
    after = prior.denoiser.state_dict()
    encoder = [name for name in first if name.startswith("map_encoder.")]
    assert encoder and not all(torch.equal(first[name], after[name]) for name in encoder), "maps are learned further"
    assert losses["personal_loss"] < 0.9 * losses["personal_loss_before"]


def test_priors_that_know_maps_are_personalised_beside_such_maps_only(box_room_collection, few, tmp_path):
    require_weights("lpips-alex")
    known = load_domain_prior(
        train_prior(box_room_collection, tmp_path / "start", MODEL, TRAINING, with_maps=True, max_images=6)
    )
    known.maps = replace(known.maps, reach=known.maps.reach + 1)
    with pytest.raises(UserInputError, match="has other maps than the prior knows"):
        train_prior(
            box_room_collection,
            tmp_path / "made",
            {},
            TRAINING,
            personal=Personalisation(known, example_paths(few)),
        )
    assert not (tmp_path / "made" / "prior").exists()


def test_the_command_personalises(box_room_collection, start, few, tmp_path, capsys):
    arguments = [str(box_room_collection.root), "--personalise", str(few), "--initial-prior", str(start)]
    arguments += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--max-images", "6"]
    with pytest.raises(SystemExit):
        main([*arguments, "--condition", "bev"])
    assert "leave out --condition" in capsys.readouterr().err
    main([*arguments, "--report-to", "none"])
    prior = load_domain_prior(tmp_path / "run")
    assert prior.image_size == 16 and len(prior.clean_embeddings) == 3
    assert told(tmp_path / "run" / "prior")["command"] == "nfldm-train-prior --personalise"
