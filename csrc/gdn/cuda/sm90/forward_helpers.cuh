// The warps of a block that load q and k and prepare tiles (tile.cuh) for the states. Blocks of a cluster
// share this: q and k of a tile are loaded for a helper of one of them, which sends what it makes of them to
// the others, and by chunks for the states of each.
#pragma once

#include <numeric>

#include "gdn/cuda/sm90/forward_unit.cuh"

namespace lt2::gdn::sm90 {

// q and k of a chunk of tile i. By one thread.
template <class Traits>
__device__ void load_chunk(char* to, ForwardMaps const& maps, ForwardUnit const& unit, int i, int chunk,
                           Barrier& loaded) {
  TileTokens const t = unit.tile(i);
#pragma unroll
  for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
    load_tile(to, maps.k, tile * kTileSide, unit.qk_head, t.begin + chunk * kChunk, t.row, loaded);
    if constexpr (Traits::kPass == Pass::kOutputs) {
      load_tile(to + kHalfTileBytes, maps.q, tile * kTileSide, unit.qk_head, t.begin + chunk * kChunk, t.row,
                loaded);
    }
    to += kTileBytes;
  }
}
template <class Traits>
inline constexpr int kLoadedBytes =
    Traits::kPass == Pass::kOutputs ? Traits::kChunkBytes : Traits::kChunkBytes / 2;

// What a helper's thread asks for ahead of a tile: its token's gate, and where keys are folded its row of q
// or k, which the copy engine then finds in the L2 cache.
template <class Traits>
struct Ahead {
  static constexpr int kStep = Traits::kTurns * kTileSide;
  float const* gate;
  char const* row;

  __device__ Ahead(ForwardLaunch const& a, ForwardUnit const& unit, int i, int thread) {
    bool const has_k = thread < kTileSide;
    int const token = unit.begin + i * kTileSide + thread % kTileSide;
    gate = portable::token_row<float const>(has_k ? a.p.beta : a.p.g, unit.row, token, unit.head);
    row = reinterpret_cast<char const*>(
        portable::token_row<typename Traits::T const>(has_k ? a.p.k : a.p.q, unit.row, token, unit.qk_head));
  }
  // For tile i, then one kStep tokens later.
  __device__ void request(TileScratch& scratch, ForwardLaunch const& a, ForwardUnit const& unit, int i,
                          int thread) {
    bool const has_k = thread < kTileSide;
    int const token = thread % kTileSide;
    bool const there = token < unit.tile(i).count;
    Strided const &gates = has_k ? a.p.beta : a.p.g, &rows = has_k ? a.p.k : a.p.q;
    if (gates.data != nullptr) request_gate(gate, there, (has_k ? scratch.beta : scratch.g) + token);
    gate += gates.token * kStep;
    if constexpr (Traits::kFolds) {
      if (there && (has_k || Traits::kPass == Pass::kOutputs)) {
#pragma unroll
        for (int line = 0; line < Traits::kKeyTiles; ++line)
          asm volatile("prefetch.global.L2 [%0];" ::"l"(row + line * 128));
      }
      row += rows.token * kStep * sizeof(typename Traits::T);
    }
  }
};

// A helper warpgroup: tiles `helper`, + kHelpers, ...
template <class Traits>
__device__ void prepare_tiles(typename Traits::Shared& shared, ForwardLaunch const& a,
                              ForwardMaps const& maps, ForwardUnit const& unit, int helper, int thread) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages, kPrepared = Traits::kPrepared, kHelpers = Traits::kHelpers;
  constexpr bool kOutputs = Traits::kPass == Pass::kOutputs, kFolds = Traits::kFolds;
  auto const load_qk = [&](int i) {
    Barrier& loaded = shared.loaded[i % kStages];
    loaded.arrive_expecting(kTileChunks * kLoadedBytes<Traits>);
#pragma unroll 1
    for (int c = 0; c < kTileChunks; ++c)
      load_chunk<Traits>(shared.qk[i % kStages][c], maps, unit, i, c, loaded);
  };
  auto const wait_read = [&](int i) { shared.read[i % kStages].wait((i / kStages) & 1); };
  auto const wait_released = [&](int i) {
    if (i >= 0) shared.released[i % kPrepared].wait((i / kPrepared) & 1);
  };
  if (helper >= unit.tiles) return;
  if (thread == 0) {
    load_qk(helper);
    if (kHelpers == 1 && unit.tiles > 1) load_qk(1);
  }
  Ahead<Traits> ahead(a, unit, helper, thread);
  auto const request = [&](int i) { ahead.request(shared.scratch[i % 2], a, unit, i, thread); };
  request(helper);
  for (int i = helper; i < unit.tiles; i += kHelpers) {
    int const stage = i % kStages, prepared = i % kPrepared, next = i + kHelpers;
    // What follows from the thread's number is cheaper to compute again than to keep from tile to tile in the
    // few registers there are.
    asm volatile("" : "+r"(thread));
    thread &= kWarpgroup - 1;  // the range, or divisions would be of any number
    wait_released(i - kPrepared);
    shared.loaded[stage].wait((i / kStages) & 1);
    prepare_tile<T, Traits::kKeyDim, kOutputs, kFolds, false>(
        a.p, unit.tile(i).count, shared.qk[stage][0], shared.scratch[i % 2], shared.tiles[prepared],
        shared.gains[i % Traits::kGains], 1 + kTileBarriers * helper, thread, unit.head,
        [&] {
          if (next < unit.tiles) request(next);
        },
        [&] { wait_released(i - 2); }, [] {});
    shared.prepared[prepared].arrive();
    static_assert(kStages == 3);
    if (i + 2 < unit.tiles) {
      if (i > 0) wait_read(i - 1);
      if (thread == 0) load_qk(i + 2);
    }
  }
}

// q and k of the tile that a helper of a cluster prepares.
template <class Traits>
__device__ auto& own_qk(typename Traits::Shared& shared, int helper) {
  if constexpr (Traits::kAside) {
    static_assert(Traits::kHelpers <= Traits::kStages);
    return shared.qk[helper];
  } else {
    return shared.own_qk;
  }
}

// A helper of a cluster prepares tile i for place i % kPrepared of all blocks, and waits in its own until
// these have left tile i - kPrepared. There somebody waits at the same barrier again this many tiles later.
template <class Traits>
inline constexpr int kReleasePeriod =
    Traits::kAside ? Traits::kPrepared : std::lcm(Traits::kPrepared, Traits::kCluster);

// Helper `helper` of block `rank` of a cluster: tiles from its turn on, of q and k of its own.
template <class Traits>
__device__ void prepare_shared_tiles(typename Traits::Shared& shared, ForwardLaunch const& a,
                                     ForwardUnit const& unit, int rank, int helper, int thread) {
  constexpr int kPrepared = Traits::kPrepared, kCluster = Traits::kCluster, kTurns = Traits::kTurns;
  constexpr bool kOutputs = Traits::kPass == Pass::kOutputs;
  int const turn = Traits::kAside ? helper : rank, barrier = 1 + kTileBarriers * helper;
  auto& qk = own_qk<Traits>(shared, helper);
  TileScratch& scratch = shared.scratch[helper];
  Ahead<Traits> ahead(a, unit, turn, thread);
  auto const request = [&](int i) {
    if (i < unit.tiles) ahead.request(scratch, a, unit, i, thread);
  };
  request(turn);
  for (int i = turn; i < unit.tiles; i += kTurns) {
    int const place = i % kPrepared, before = i - kPrepared;
    PreparedTile& to = shared.tiles[place];
    asm volatile("" : "+r"(thread));
    thread &= kWarpgroup - 1;  // the range, or divisions would be of any number
    shared.own_loaded[helper].wait((i / kTurns) & 1);
    prepare_tile<typename Traits::T, Traits::kKeyDim, kOutputs, Traits::kFolds, true>(
        a.p, unit.tile(i).count, qk[0], scratch, to, shared.gains[place], barrier, thread, unit.head,
        [&] { request(i + kTurns); },
        [&] {
          if (before >= 0) shared.released[place].wait_for_cluster(before / kReleasePeriod<Traits> % 2);
        },
        [&] {
          __syncwarp();
          if (thread % 32 == 0) shared.own_read[helper].arrive();
        });
    Barrier& prepared = shared.prepared[place];
    if constexpr (!Traits::kAside) prepared.arrive();
    named_barrier(barrier, kWarpgroup);
    if (thread == 0) {
#pragma unroll
      for (int other = 1; other < kCluster; ++other) {
        int const peer = (rank + other) % kCluster;
        prepared.arrive_expecting_at(peer, kWarpgroup, kPreparedBytes + Traits::kGainBytes);
        send_bytes(&to, kPreparedBytes, prepared, peer);
        if constexpr (Traits::kFolds) send_bytes(shared.gains[place], Traits::kGainBytes, prepared, peer);
      }
    }
  }
}

// The loading warps of blocks that share.
template <class Traits>
__device__ void load_for_states(typename Traits::Shared& shared, ForwardMaps const& maps,
                                ForwardUnit const& unit, int lane) {
  constexpr int kStages = Traits::kStages, kTiles = Traits::kKeyTiles;
  uint32_t tails = 0;
#pragma unroll 1
  for (int n = 0; n < unit.tiles * kTileChunks; ++n) {
    int const i = n / kTileChunks, c = n % kTileChunks, stage = i % kStages;
    char* const to = shared.qk[stage][c];
    if (i >= kStages) shared.chunk_read[stage][c].wait((i / kStages - 1) & 1);
    int const count = unit.tile(i).count - c * kChunk;
    bool const whole = count >= kChunk;
    Barrier& loaded = whole ? shared.chunk_loaded[stage][c] : shared.tail_loaded;
    if (lane == 0) {
      loaded.arrive_expecting(kLoadedBytes<Traits>);
      load_chunk<Traits>(to, maps, unit, i, c, loaded);
    }
    if (!whole) {  // what follows the sequence may be anything
      loaded.wait(tails++ & 1);
      if (lane >= count) {
        clear_row<kTiles>(to, lane);
        if (Traits::kPass == Pass::kOutputs) clear_row<kTiles>(to, kChunk + lane);
      }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) shared.chunk_loaded[stage][c].arrive();
    }
  }
}
template <class Traits>
__device__ void load_for_helper(typename Traits::Shared& shared, ForwardMaps const& maps,
                                ForwardUnit const& unit, int rank, int helper, int lane) {
  constexpr int kTurns = Traits::kTurns;
  auto& qk = own_qk<Traits>(shared, helper);
  Barrier& loaded = shared.own_loaded[helper];
#pragma unroll 1
  for (int i = Traits::kAside ? helper : rank; i < unit.tiles; i += kTurns) {
    if (i >= kTurns) shared.own_read[helper].wait((i / kTurns - 1) & 1);
    if (lane == 0) {
      loaded.arrive_expecting(kTileChunks * kLoadedBytes<Traits>);
#pragma unroll 1
      for (int c = 0; c < kTileChunks; ++c) load_chunk<Traits>(qk[c], maps, unit, i, c, loaded);
    }
    __syncwarp();
  }
}

}  // namespace lt2::gdn::sm90
