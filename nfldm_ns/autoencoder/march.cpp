// What rays of one scene see: `march` and `what_rays_see` of skipping.py in one go, ray by ray.
//
// Positions are in units of voxels as in SampledRays: voxel centres lie at 1, 2, ..., so that the integer part of a
// position is the number of its cell, and its corners are neighbours in tables with a border of one voxel.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Scene {
    const uint8_t* distance;  // of cells, (Z + 1) x (Y + 1) x (X + 1)
    const float* density;     // with its border, (Z + 2) x (Y + 2) x (X + 2)
    const float* rows;        // features of the same voxels, each with its C channels
    int32_t sizes[3];         // Z, Y, X
    int64_t channels;
};

struct Rays {
    const float* first;  // 3 x N (z, y, x)
    const float* step;   // 3 x N
    const float* delta;  // N, metres
    int64_t count, samples;
};

struct Ray {
    float first[3], step[3], delta;

    Ray(const Rays& rays, int64_t index) : delta(rays.delta[index]) {
        for (int axis = 0; axis < 3; ++axis) {
            first[axis] = rays.first[axis * rays.count + index];
            step[axis] = rays.step[axis * rays.count + index];
        }
    }
};

// A place as its cell and where it lies in it; within the tables whatever the place is.
struct Place {
    int32_t cell[3];
    float in_cell[3];

    Place(const Scene& scene, const Ray& ray, float number) {
        for (int axis = 0; axis < 3; ++axis) {
            const float at = ray.first[axis] + ray.step[axis] * number;
            cell[axis] = std::min(std::max(int32_t(at), 0), scene.sizes[axis]);
            in_cell[axis] = at - cell[axis];
        }
    }

    int64_t among_cells(const Scene& scene) const {
        return (int64_t(cell[0]) * (scene.sizes[1] + 1) + cell[1]) * (scene.sizes[2] + 1) + cell[2];
    }
    int64_t among_voxels(const Scene& scene) const {
        return (int64_t(cell[0]) * (scene.sizes[1] + 2) + cell[1]) * (scene.sizes[2] + 2) + cell[2];
    }
};

// Samples of one ray, front to back. `passed` is the optical depth before each, and one more behind the last.
struct Samples {
    std::vector<float> number, passed, weight;
    std::vector<int32_t> read;  // the samples whose features are read

    explicit Samples(int64_t most) : number(most), passed(most + 1), weight(most + 1), read(most) {}
};

inline float density_at(const Scene& scene, const Place& place) {
    const int64_t row = scene.sizes[2] + 2, plane = row * (scene.sizes[1] + 2);
    const float z = place.in_cell[0], y = place.in_cell[1], x = place.in_cell[2];
    const float* low = scene.density + place.among_voxels(scene);
    const auto along_x = [&](const float* from) { return from[0] + x * (from[1] - from[0]); };
    const auto along_y = [&](const float* from) {
        const float near = along_x(from);
        return near + y * (along_x(from + row) - near);
    };
    const float near = along_y(low);
    return near + z * (along_y(low + plane) - near);
}

int march(const Scene& scene, const Ray& ray, int64_t samples, float opaque, Samples& seen) {
    if (!(ray.delta > 0)) return 0;
    float fastest = 1e-6f, passed = 0;
    for (int axis = 0; axis < 3; ++axis) fastest = std::max(fastest, std::abs(ray.step[axis]));
    const float reach = (1 - 1e-4f) / fastest;
    int count = 0;
    for (int32_t number = 0; number < samples && passed < opaque; ++number) {
        const Place place(scene, ray, number);
        const int distance = scene.distance[place.among_cells(scene)];
        if (distance) {
            number += int32_t((distance - 1) * reach);
            continue;
        }
        seen.number[count] = number;
        seen.passed[count++] = passed;
        passed += density_at(scene, place) * ray.delta;
    }
    seen.passed[count] = passed;
    return count;
}

// Weights of samples: how much of the light each takes away. A loop of its own, so that exponentials are vectorised.
void weigh(Samples& seen, int count) {
    float* light = seen.weight.data();
    const float* passed = seen.passed.data();
    for (int i = 0; i <= count; ++i) light[i] = std::exp(-passed[i]);
    for (int i = 0; i < count; ++i) light[i] -= light[i + 1];
}

// Chooses the samples whose features are read, and gives how many and their whole weight.
int choose(Samples& seen, int count, int64_t kept, float bound, float& sum) {
    int chosen = 0;
    const float least = kept > 0 ? 0 : bound;
    for (int i = 0; i < count; ++i) {
        seen.read[chosen] = i;
        chosen += seen.weight[i] > least;
    }
    if (kept > 0 && chosen > kept) {
        const auto heavier = [&](int32_t a, int32_t b) { return seen.weight[a] > seen.weight[b]; };
        std::nth_element(seen.read.begin(), seen.read.begin() + kept, seen.read.begin() + chosen, heavier);
        chosen = kept;
    }
    sum = 0;
    for (int i = 0; i < chosen; ++i) sum += seen.weight[seen.read[i]];
    return chosen;
}

// GCC and Clang keep these in registers, where they leave arrays of floats in memory.
typedef float Eight __attribute__((vector_size(32)));

// Sums `Count` times as many channels as `Lanes` has, from `begin` on; gives how many. Samples in one cell read its
// voxels once, for their shares of them add up.
template <typename Lanes, int Count>
int64_t add_features(const Scene& scene, const Ray& ray, const Samples& seen, int chosen, float scale, int64_t begin,
                     float* features) {
    constexpr int64_t width = sizeof(Lanes) / sizeof(float);
    const int64_t row = scene.sizes[2] + 2, plane = row * (scene.sizes[1] + 2);
    const int64_t corners[4] = {0, row, plane, plane + row};
    Lanes sum[Count] = {};
    float shares[8] = {};
    const float* low = nullptr;
    const auto read = [&] {
        for (int corner = 0; corner < 8; ++corner) {
            const float* from = low + (corners[corner / 2] + corner % 2) * scene.channels;
            const float share = shares[corner];
            for (int i = 0; i < Count; ++i) {
                Lanes values;
                std::memcpy(&values, from + i * width, sizeof(Lanes));
                sum[i] += share * values;
            }
        }
    };
    for (int i = 0; i < chosen; ++i) {
        const Place place(scene, ray, seen.number[seen.read[i]]);
        const float* here = scene.rows + place.among_voxels(scene) * scene.channels + begin;
        if (here != low) {
            if (low) read();
            low = here;
            std::fill(shares, shares + 8, 0.0f);
        }
        const float z = place.in_cell[0], y = place.in_cell[1], x = place.in_cell[2];
        const float weight = seen.weight[seen.read[i]] * scale;
        for (int corner = 0; corner < 8; ++corner)
            shares[corner] += weight * (corner & 4 ? z : 1 - z) * (corner & 2 ? y : 1 - y) * (corner & 1 ? x : 1 - x);
    }
    if (low) read();
    std::memcpy(features + begin, sum, sizeof(sum));
    return Count * width;
}

void see(const Scene& scene, const Rays& rays, int64_t index, int64_t kept, float bound, float eps, Samples& seen,
         float* features, float* accumulation, float* ended) {
    const Ray ray(rays, index);
    const int count = march(scene, ray, rays.samples, -std::log(bound), seen);
    weigh(seen, count);
    float total = 0, numbers = 0, read_weight;
    for (int i = 0; i < count; ++i) {
        total += seen.weight[i];
        numbers += seen.weight[i] * (seen.number[i] + 0.5f);
    }
    accumulation[index] = total;
    ended[index] = numbers;
    const int chosen = choose(seen, count, kept, bound, read_weight);
    const float scale = total / (read_weight + eps);
    float* sums = features + index * scene.channels;
    for (int64_t c = 0; c < scene.channels;) {
        const int64_t left = scene.channels - c;
        const auto add = left >= 32   ? add_features<Eight, 4>
                         : left >= 16 ? add_features<Eight, 2>
                         : left >= 8  ? add_features<Eight, 1>
                                      : add_features<float, 1>;
        c += add(scene, ray, seen, chosen, scale, c, sums);
    }
}

}  // namespace

extern "C" void nfldm_what_rays_see(const uint8_t* distance, const float* density, const float* rows, int64_t z,
                                    int64_t y, int64_t x, int64_t channels, const float* first, const float* step,
                                    const float* delta, int64_t count, int64_t samples, int64_t kept, float bound,
                                    float eps, int64_t threads, float* features, float* accumulation, float* ended) {
    const Scene scene{distance, density, rows, {int32_t(z), int32_t(y), int32_t(x)}, channels};
    const Rays rays{first, step, delta, count, samples};
    const int64_t at_once = 256;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        Samples seen(samples);
        for (int64_t begin; (begin = next.fetch_add(at_once)) < count;)
            for (int64_t ray = begin; ray < std::min(begin + at_once, count); ++ray)
                see(scene, rays, ray, kept, bound, eps, seen, features, accumulation, ended);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
