// The ops of tile kernels again, compiled for AVX2: see tiles/isa.h.
#define RESFUSE_AVX2 1

#include "tiles/isa.h"

#if RESFUSE_HAS_TILES
#include "conv_act.cpp"
#include "conv_stats.cpp"
#include "conv_stats_backward.cpp"
#include "expand_bn_act_backward.cpp"
#include "folded_weight.cpp"
#include "pack_weight.cpp"
#include "run_plan.cpp"
#include "second_moments.cpp"
#endif
