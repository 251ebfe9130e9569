"""Triton's kernels: a file for each unit, in it a launcher for each of its operators, with the operator's arguments.

Nothing is compiled at import. The files need Triton alone, so that they can be compiled where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resfuse._triton.add_relu import add_relu, add_relu_backward
from resfuse._triton.candidates import conv_act, conv_stats, conv_stats_backward, conv_stats_backward_
from resfuse._triton.expand_bn_act_backward import expand_bn_act_backward_input, expand_bn_act_backward_weight
from resfuse._triton.finalize import finalize, finalize_backward
from resfuse._triton.folded_weight import folded_moments, folded_weight, folded_weight_backward
from resfuse._triton.moments import moments, moments_backward
from resfuse._triton.pool import scale_shift_relu_maxpool
from resfuse._triton.scale_shift_act import scale_shift_act, scale_shift_act_, scale_shift_act_moments
from resfuse._triton.scale_shift_act_backward import (
    scale_shift_act_backward_apply,
    scale_shift_act_backward_apply_,
    scale_shift_act_backward_reduce,
    scale_shift_relu_maxpool_backward_apply,
    scale_shift_relu_maxpool_backward_apply_,
    scale_shift_relu_maxpool_backward_reduce,
)
from resfuse._triton.second_moments import second_moments

# What serves the overload `.triton` of each operator; ops.py registers them.
LAUNCHERS: dict[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        add_relu,
        add_relu_backward,
        moments,
        moments_backward,
        finalize,
        finalize_backward,
        scale_shift_act,
        scale_shift_act_,
        scale_shift_act_moments,
        scale_shift_act_backward_reduce,
        scale_shift_act_backward_apply,
        scale_shift_act_backward_apply_,
        scale_shift_relu_maxpool,
        scale_shift_relu_maxpool_backward_reduce,
        scale_shift_relu_maxpool_backward_apply,
        scale_shift_relu_maxpool_backward_apply_,
        conv_stats,
        conv_stats_backward,
        conv_stats_backward_,
        conv_act,
        second_moments,
        expand_bn_act_backward_weight,
        expand_bn_act_backward_input,
        folded_moments,
        folded_weight,
        folded_weight_backward,
    )
}
