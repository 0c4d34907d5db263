// What rays of one scene see: `march` and `what_rays_see` of skipping.py in one go, ray by ray.
//
// Positions are in units of voxels as in SampledRays: voxel centres lie at 1, 2, ..., so that the integer part of a
// position is the number of its cell, and its corners are neighbours in tables with a border of one voxel.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

struct Sample {
    float number, weight;
};

struct Scene {
    const uint8_t* distance;  // of cells, (Z + 1) x (Y + 1) x (X + 1)
    const float* density;     // with its border, (Z + 2) x (Y + 2) x (X + 2)
    const float* rows;        // features, R x C
    const int32_t* row_of;    // of voxels with their border, or null where rows are in this order
    int64_t sizes[3];         // Z, Y, X
    int64_t channels;
};

struct Rays {
    const float* first;  // 3 x N (z, y, x)
    const float* step;   // 3 x N
    const float* delta;  // N, metres
    int64_t count, samples;
};

struct Corners {
    int64_t voxel;
    float z, y, x;
};

// Within the table whatever the position is.
inline int64_t cell_of(const Scene& scene, const float* place, int axis) {
    return std::min(std::max(int64_t(place[axis]), int64_t(0)), scene.sizes[axis]);
}

inline Corners corners_at(const Scene& scene, const float* place) {
    const int64_t k = cell_of(scene, place, 0), j = cell_of(scene, place, 1), i = cell_of(scene, place, 2);
    return {(k * (scene.sizes[1] + 2) + j) * (scene.sizes[2] + 2) + i, place[0] - k, place[1] - j, place[2] - i};
}

inline float density_at(const Scene& scene, const Corners& at) {
    const int64_t row = scene.sizes[2] + 2, plane = row * (scene.sizes[1] + 2);
    const float* low = scene.density + at.voxel;
    const auto along_x = [&](const float* from) { return from[0] + at.x * (from[1] - from[0]); };
    const auto along_y = [&](const float* from) {
        const float near = along_x(from);
        return near + at.y * (along_x(from + row) - near);
    };
    const float near = along_y(low);
    return near + at.z * (along_y(low + plane) - near);
}

void add_features(const Scene& scene, const Corners& at, float weight, float* sum) {
    const int64_t row = scene.sizes[2] + 2, plane = row * (scene.sizes[1] + 2);
    for (int corner = 0; corner < 8; ++corner) {
        const bool z = corner & 4, y = corner & 2, x = corner & 1;
        int64_t index = at.voxel + z * plane + y * row + x;
        if (scene.row_of) index = scene.row_of[index];
        const float share = weight * (z ? at.z : 1 - at.z) * (y ? at.y : 1 - at.y) * (x ? at.x : 1 - at.x);
        const float* values = scene.rows + index * scene.channels;
        for (int64_t c = 0; c < scene.channels; ++c) sum[c] += share * values[c];
    }
}

inline void place_of(const Rays& rays, int64_t ray, float number, float* place) {
    for (int axis = 0; axis < 3; ++axis)
        place[axis] = rays.first[axis * rays.count + ray] + rays.step[axis * rays.count + ray] * number;
}

void march(const Scene& scene, const Rays& rays, int64_t ray, float opaque, std::vector<Sample>& seen) {
    seen.clear();
    if (!(rays.delta[ray] > 0)) return;
    float fastest = 1e-6f, passed = 0, place[3];
    for (int axis = 0; axis < 3; ++axis) fastest = std::max(fastest, std::abs(rays.step[axis * rays.count + ray]));
    const float reach = (1 - 1e-4f) / fastest;
    for (float number = 0; number < rays.samples && passed < opaque;) {
        place_of(rays, ray, number, place);
        const int64_t k = cell_of(scene, place, 0), j = cell_of(scene, place, 1), i = cell_of(scene, place, 2);
        const int distance = scene.distance[(k * (scene.sizes[1] + 1) + j) * (scene.sizes[2] + 1) + i];
        if (distance == 0) {
            const float depth = density_at(scene, corners_at(scene, place)) * rays.delta[ray];
            seen.push_back({number, std::exp(-passed) * -std::expm1(-depth)});
            passed += depth;
        }
        number += 1 + std::floor(std::max(distance - 1, 0) * reach);
    }
}

// Keeps the samples whose features are read, and gives their whole weight.
float choose(std::vector<Sample>& seen, int64_t kept, float bound) {
    if (kept > 0 && int64_t(seen.size()) > kept) {
        std::nth_element(seen.begin(), seen.begin() + kept, seen.end(),
                         [](const Sample& a, const Sample& b) { return a.weight > b.weight; });
        seen.resize(kept);
    } else if (kept <= 0) {
        seen.erase(std::remove_if(seen.begin(), seen.end(), [&](const Sample& s) { return !(s.weight > bound); }),
                   seen.end());
    }
    float sum = 0;
    for (const Sample& sample : seen) sum += sample.weight;
    return sum;
}

void see(const Scene& scene, const Rays& rays, int64_t ray, int64_t kept, float bound, float eps,
         std::vector<Sample>& seen, float* features, float* accumulation, float* ended) {
    march(scene, rays, ray, -std::log(bound), seen);
    float total = 0, numbers = 0, place[3];
    for (const Sample& sample : seen) {
        total += sample.weight;
        numbers += sample.weight * (sample.number + 0.5f);
    }
    accumulation[ray] = total;
    ended[ray] = numbers;
    float* sum = features + ray * scene.channels;
    std::fill(sum, sum + scene.channels, 0.0f);
    const float scale = total / (choose(seen, kept, bound) + eps);
    for (const Sample& sample : seen) {
        place_of(rays, ray, sample.number, place);
        add_features(scene, corners_at(scene, place), sample.weight * scale, sum);
    }
}

}  // namespace

extern "C" void nfldm_what_rays_see(const uint8_t* distance, const float* density, const float* rows,
                                    const int32_t* row_of, int64_t z, int64_t y, int64_t x, int64_t channels,
                                    const float* first, const float* step, const float* delta, int64_t count,
                                    int64_t samples, int64_t kept, float bound, float eps, int64_t threads,
                                    float* features, float* accumulation, float* ended) {
    const Scene scene{distance, density, rows, row_of, {z, y, x}, channels};
    const Rays rays{first, step, delta, count, samples};
    const int64_t at_once = 256;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<Sample> seen;
        for (int64_t begin; (begin = next.fetch_add(at_once)) < count;)
            for (int64_t ray = begin; ray < std::min(begin + at_once, count); ++ray)
                see(scene, rays, ray, kept, bound, eps, seen, features, accumulation, ended);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
