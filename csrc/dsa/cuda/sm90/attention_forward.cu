#include "dsa/cuda/sm90/attention_forward.cuh"
#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {
namespace {

template <Dtype kDtype, int kDim, Source kSource>
Status launch_forward(ForwardLaunch const& a, void* stream) {
  using Traits = ForwardTraits<Element<kDtype>, kDim, kSource>;
  constexpr bool kGather = Traits::kGather;
  AttentionForwardParams const& p = a.p;
  int const heads = kGather ? static_cast<int>(p.query_heads / p.key_heads) : 1;
  ForwardMaps maps;
  Status const made = make_maps(kDtype, {{&maps.q, queries(p, p.q, kDim), kTile / heads, heads},
                                         {&maps.k, keys(p, p.k, kDim), kTile},
                                         {&maps.v, keys(p, p.v, kDim), kTile},
                                         {&maps.o, queries(p, p.o, kDim), kTileSide / heads, heads}});
  if (made != kOk) return made;
  int64_t const units = kGather ? a.unions.tiles * p.key_heads : a.masks.query_tiles * p.query_heads;
  return launch(forward_kernel<Traits>, p.batch * units, Traits::kThreads, sizeof(typename Traits::Shared),
                stream, a, maps);
}

}  // namespace

int64_t attention_workspace(AttentionForwardParams const& p) {
  if (is_step(p) || p.dense) return 0;
  Arena arena{nullptr};
  int* const redo = take_flags(arena).redo;
  if (gathers(p)) {
    take_unions(p, arena);
  } else {
    take_masks(p, arena, redo, nullptr);
  }
  return arena.floats;
}

Status attention(AttentionForwardParams const& p, float* workspace, void* stream) {
  if (is_step(p)) return attention_step(p, stream);
  ForwardLaunch a{p, {}, {}};
  if (p.dense) {
    a.masks = cut_masks(p);
    return with_shape(
        p, [&](auto dtype, auto dim) { return launch_forward<dtype, dim, Source::kWindow>(a, stream); });
  }
  Arena arena{workspace};
  Flags const flags = take_flags(arena);
  int* const redo = flags.redo;
  if (Status const s = clear(flags, stream); s != kOk) return s;
  bool const gather = gathers(p);
  if (gather) {
    a.unions = take_unions(p, arena);
    a.masks.redo = redo;
  } else {
    a.masks = take_masks(p, arena, redo, nullptr);
  }
  Status const selected = gather ? make_unions(p, a.unions, redo, stream) : make_masks(p, a.masks, stream);
  if (selected != kOk) return selected;
  Status const done = with_shape(p, [&](auto dtype, auto dim) {
    return gather ? launch_forward<dtype, dim, Source::kUnions>(a, stream)
                  : launch_forward<dtype, dim, Source::kMasks>(a, stream);
  });
  return done != kOk ? done : portable::attention_if(p, nullptr, stream, redo);
}

}  // namespace lt2::dsa::sm90
