"""Triton kernels of the loss: device code only. `triton_backend` launches them and states their contracts.

Rows. A token's logits are one row. Tokens lie in a grid [outer, inner] with two strides per tensor, which covers every
view that Megatron makes, such as logits [s, b, V/tp] with labels that are a transposed [b, s]. Row offsets are int64:
20,000 rows of 152,064 columns pass 2^31.

Alignment. VECTOR is the number of elements, at most 16 bytes of them, by which the rows' strides and length are
divisible. These come in units of VECTOR, so that the compiler sees the alignment that it needs to load a vector at
once. No integer argument is specialized beyond that: a batch of another shape meets compiled kernels.

Columns. Blocks of columns that are all valid are read without a mask. The last block is read up to the end of the row
in memory, and what lies beyond `valid_columns` is then replaced: a mask that ends at an odd true vocabulary would break
the vectors into single elements.
"""

import triton
import triton.language as tl

from megatron_idft.objectives import DEFT_EPSILON as _DEFT_EPSILON
from megatron_idft.statistics import LOWEST as _LOWEST

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(_LOWEST)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_INDEX = tl.constexpr(2**30)
DEFT_EPSILON = tl.constexpr(_DEFT_EPSILON)

_INTEGERS = [
    *("num_tokens", "inner_size", "num_shards", "shard_stride", "start", "valid_columns", "row_vectors", "vocab_size"),
    *("column_stride", "logits_column_stride", "gradient_column_stride"),
    *(f"{name}_{axis}_stride" for name in ("logits", "gradient", "labels", "upstream") for axis in ("outer", "inner")),
]


@triton.jit(do_not_specialize=_INTEGERS)
def shard_state_kernel(
    logits,
    labels,
    state,
    inner_size,
    logits_outer_stride,
    logits_inner_stride,
    column_stride,
    labels_outer_stride,
    labels_inner_stride,
    start,
    valid_columns,
    row_vectors,
    vocab_size,
    STATE_SIZE: tl.constexpr,
    SUM_SQUARES: tl.constexpr,  # column of the state, 0 if not asked for
    ARGMAX: tl.constexpr,  # column of the state, 0 if not asked for
    CONTIGUOUS: tl.constexpr,  # column_stride == 1
    VECTORS: tl.constexpr,  # per lane and block
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,  # blocks in flight through shared memory; 1: straight into registers
):
    """One program per token: the shard's state (statistics.py) from one read of each valid logit.

    Every lane keeps statistics of its own columns, relative to its own maximum, so the loop needs no communication
    between lanes: they meet once, at the end of the row. An element costs one exponential; each lane's rescaling costs
    one more per block.
    """
    token = tl.program_id(0)
    outer = (token // inner_size).to(tl.int64)
    inner = (token % inner_size).to(tl.int64)
    label = tl.load(labels + outer * labels_outer_stride + inner * labels_inner_stride)
    logits += (outer * logits_outer_stride + inner * logits_inner_stride) * VECTOR
    state += token.to(tl.int64) * STATE_SIZE
    if (label < 0) | (label >= vocab_size):
        for column in tl.static_range(STATE_SIZE):
            tl.store(state + column, LOWEST if column == 0 or column == 3 else 0.0)
        return

    TILE: tl.constexpr = LANES * VECTOR
    BLOCK: tl.constexpr = VECTORS * TILE
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full([LANES], LOWEST, tl.float32)
    sum_exp = tl.zeros([LANES], tl.float32)
    sum_shifted = tl.zeros([LANES], tl.float32)
    sum_squares = tl.zeros([LANES], tl.float32)
    argmax = tl.full([LANES], NO_INDEX, tl.int32)

    whole_blocks = valid_columns // BLOCK * BLOCK
    for first in tl.range(0, whole_blocks, BLOCK, num_stages=STAGES):
        xs = ()
        for v in tl.static_range(VECTORS):
            columns = first + v * TILE + tile
            xs += (tl.load(logits + _offsets(columns, column_stride, CONTIGUOUS)),)
        maximum, sum_exp, sum_shifted, sum_squares, argmax = _accumulate(
            xs, first + tile, maximum, sum_exp, sum_shifted, sum_squares, argmax, SUM_SQUARES, ARGMAX
        )
    if whole_blocks < valid_columns:
        xs = ()
        for v in tl.static_range(VECTORS):
            columns = whole_blocks + v * TILE + tile
            in_row = columns < row_vectors * VECTOR
            x = tl.load(logits + _offsets(columns, column_stride, CONTIGUOUS), mask=in_row, other=0.0)
            xs += (tl.where(columns < valid_columns, x, _minus_infinity(x.dtype)),)
        maximum, sum_exp, sum_shifted, sum_squares, argmax = _accumulate(
            xs, whole_blocks + tile, maximum, sum_exp, sum_shifted, sum_squares, argmax, SUM_SQUARES, ARGMAX
        )

    row_max = tl.max(maximum, 0)
    shift = maximum - row_max
    scale = tl.exp2(shift * LOG2_E)
    tl.store(state, row_max)
    tl.store(state + 1, tl.sum(sum_exp * scale, 0))
    tl.store(state + 2, tl.sum((sum_shifted + sum_exp * shift) * scale, 0))
    target = label - start
    target_logit = LOWEST
    if (target >= 0) & (target < valid_columns):
        target_logit = tl.load(logits + target * column_stride).to(tl.float32)
    tl.store(state + 3, target_logit)
    if SUM_SQUARES:
        tl.store(state + SUM_SQUARES, tl.sum(sum_squares * scale * scale, 0))
    if ARGMAX:
        first_max = tl.min(tl.where(maximum == row_max, argmax, NO_INDEX), 0)
        tl.store(state + ARGMAX, (first_max + start).to(tl.float32))


@triton.jit
def _accumulate(
    xs,
    columns,
    maximum,
    sum_exp,
    sum_shifted,
    sum_squares,
    argmax,
    SUM_SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """Add a block, a tuple of [LANES, VECTOR] tiles, to the lanes' statistics [LANES]; `columns` are the first tile's.

    A tuple and not one tensor of three dimensions, because Triton 3.6 gives that a layout in which lanes share columns.
    """
    block_max = tl.max(xs[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(xs)):
        block_max = tl.maximum(block_max, tl.max(xs[i].to(tl.float32), 1))
    new_max = tl.maximum(maximum, block_max)
    if ARGMAX:
        block_argmax = tl.full(argmax.shape, NO_INDEX, tl.int32)
        for i in tl.static_range(len(xs)):
            candidates = tl.where(xs[i].to(tl.float32) == block_max[:, None], columns + i * columns.numel, NO_INDEX)
            block_argmax = tl.minimum(block_argmax, tl.min(candidates, 1))
        argmax = tl.where(block_max > maximum, block_argmax, argmax)
    shift = maximum - new_max
    scale = tl.exp2(shift * LOG2_E)
    sum_shifted = (sum_shifted + sum_exp * shift) * scale
    sum_exp = sum_exp * scale
    if SUM_SQUARES:
        sum_squares = sum_squares * scale * scale
    for i in tl.static_range(len(xs)):
        shifted = xs[i].to(tl.float32) - new_max[:, None]
        # exp2, not exp: one instruction, where exp spends three more on results below 2^-126.
        exp = tl.exp2(shifted * LOG2_E)
        # The clamp makes 0 * -inf of a -inf logit 0. A NaN logit shows in sum_exp.
        sum_shifted += tl.sum(exp * tl.maximum(shifted, LOWEST), 1)
        sum_exp += tl.sum(exp, 1)
        if SUM_SQUARES:
            sum_squares += tl.sum(exp * exp, 1)
    return new_max, sum_exp, sum_shifted, sum_squares, argmax


@triton.jit
def _minus_infinity(dtype: tl.constexpr):
    # Not a Python float beside a tensor: before Triton 3.9 the interpreter has no bf16 constants.
    return tl.full([], float("-inf"), tl.float32).to(dtype)


@triton.jit
def _offsets(columns, column_stride, CONTIGUOUS: tl.constexpr):
    return columns if CONTIGUOUS else columns.to(tl.int64) * column_stride


@triton.jit(do_not_specialize=_INTEGERS)
def token_results_kernel(
    states,
    labels,
    loss,
    weight,
    log_prob,
    entropy,
    maximum,
    sum_exp,
    extras,
    reference_log_prob,
    reference_entropy,
    invalid_labels,
    num_tokens,
    num_shards,
    shard_stride,
    inner_size,
    labels_outer_stride,
    labels_inner_stride,
    vocab_size,
    log_vocab_size,
    beta,
    gamma_min,
    gamma_max,
    gamma_lambda,  # a number, or a pointer to one
    q,
    coefficient,
    log_cap,
    ratio_min,
    ratio_max,
    tilt,
    weight_floor,
    STATE_SIZE: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
    ARGMAX: tl.constexpr,
    WEIGHT: tl.constexpr,  # formula of the weight; "" leaves weight and loss to the caller
    LAMBDA_ON_DEVICE: tl.constexpr,
    EXEMPT: tl.constexpr,  # tuple of token ids
    CROSS_ENTROPY_VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """TOKENS tokens per program: merge the shards' states [R, T, STATE_SIZE] in rank order, and weigh the tokens.

    The formulas are those of `merge_shard_states` (statistics.py) and of the built-in objectives (objectives/).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    outer = (token // inner_size).to(tl.int64)
    inner = (token % inner_size).to(tl.int64)
    label = tl.load(labels + outer * labels_outer_stride + inner * labels_inner_stride, mask=exists, other=-1)
    trained = (label >= 0) & (label < vocab_size)
    # One number per program, summed by the caller: atomics would need a zeroed counter, and so one launch more.
    tl.store(invalid_labels + tl.program_id(0), tl.sum((label >= vocab_size).to(tl.int32), 0))

    states += token.to(tl.int64) * STATE_SIZE
    state = states
    row_max = tl.full([TOKENS], LOWEST, tl.float32)
    target_logit = tl.full([TOKENS], LOWEST, tl.float32)
    for _ in range(num_shards):
        row_max = tl.maximum(row_max, tl.load(state, mask=exists, other=LOWEST))
        target_logit = tl.maximum(target_logit, tl.load(state + 3, mask=exists, other=LOWEST))
        state += shard_stride
    state = states
    row_sum = tl.zeros([TOKENS], tl.float32)
    row_shifted = tl.zeros([TOKENS], tl.float32)
    row_squares = tl.zeros([TOKENS], tl.float32)
    row_argmax = tl.full([TOKENS], NO_INDEX, tl.float32)
    for _ in range(num_shards):
        shard_max = tl.load(state, mask=exists, other=LOWEST)
        shard_sum = tl.load(state + 1, mask=exists, other=0.0)
        shift = shard_max - row_max
        scale = tl.exp(shift)
        row_sum += shard_sum * scale
        row_shifted += (tl.load(state + 2, mask=exists, other=0.0) + shard_sum * shift) * scale
        if SUM_SQUARES:
            row_squares += tl.load(state + SUM_SQUARES, mask=exists, other=0.0) * scale * scale
        if ARGMAX:
            index = tl.load(state + ARGMAX, mask=exists, other=0.0)
            row_argmax = tl.where(shard_max == row_max, tl.minimum(row_argmax, index), row_argmax)
        state += shard_stride
    row_sum = tl.where(row_sum > 0, row_sum, float("nan"))
    log_normalizer = tl.log(row_sum)
    row_log_prob = tl.where(trained, (target_logit - row_max) - log_normalizer, 0.0)
    row_entropy = tl.where(trained, log_normalizer - row_shifted / row_sum, 0.0)
    tl.store(maximum + token, row_max, mask=exists)
    tl.store(sum_exp + token, row_sum, mask=exists)
    tl.store(log_prob + token, row_log_prob, mask=exists)
    tl.store(entropy + token, row_entropy, mask=exists)
    if SUM_SQUARES:
        squares = tl.where(trained, row_squares / (row_sum * row_sum), 0.0)
        tl.store(extras + (SUM_SQUARES - 4) * num_tokens + token, squares, mask=exists)
    if ARGMAX:
        tl.store(extras + (ARGMAX - 4) * num_tokens + token, tl.where(trained, row_argmax, -1.0), mask=exists)

    if WEIGHT != "":
        if WEIGHT == "ce":
            row_weight = tl.full([TOKENS], 1.0, tl.float32)
        elif WEIGHT == "zero":
            row_weight = tl.full([TOKENS], 0.0, tl.float32)
        elif WEIGHT == "dft":
            row_weight = tl.exp(row_log_prob)
        elif WEIGHT == "entropy":
            row_weight = row_entropy / log_vocab_size
        elif WEIGHT == "power":
            row_weight = tl.exp(q * row_log_prob)
        elif WEIGHT == "chord":
            row_weight = tl.exp(row_log_prob) * (0.0 - _expm1(row_log_prob))
        elif WEIGHT == "deft":
            row_weight = tl.exp(squares * row_log_prob) * (squares / (squares + DEFT_EPSILON))
        elif WEIGHT == "cll":
            row_weight = tl.exp(tl.minimum(row_log_prob + row_entropy, 0.0))
        elif WEIGHT == "idft":
            share = tl.load(gamma_lambda) if LAMBDA_ON_DEVICE else gamma_lambda
            row_weight = _idft_weight(row_log_prob, row_entropy, beta, gamma_min, gamma_max, share)
        else:
            # Anything may stand where the label is ignored.
            other_log_prob = tl.load(reference_log_prob + token, mask=trained & exists, other=0.0).to(tl.float32)
            log_ratio = row_log_prob - other_log_prob
            if WEIGHT == "idft_reference":
                other_entropy = tl.load(reference_entropy + token, mask=trained & exists, other=0.0).to(tl.float32)
                share = tl.load(gamma_lambda) if LAMBDA_ON_DEVICE else gamma_lambda
                row_weight = _idft_weight(other_log_prob, other_entropy, beta, gamma_min, gamma_max, share)
            elif WEIGHT == "prift":
                row_weight = tl.exp(other_log_prob)
            elif WEIGHT == "asft":
                row_weight = tl.exp(row_log_prob) + coefficient * _expm1(tl.minimum(0.0 - log_ratio, log_cap))
            elif WEIGHT == "sft_k3":
                row_weight = 1.0 + coefficient * _expm1(tl.minimum(0.0 - log_ratio, log_cap))
            elif WEIGHT == "minor_sft":
                row_weight = 2.0 / (1.0 + tl.exp(beta * log_ratio))
            elif WEIGHT == "gift":
                row_weight = 1.0 / (1.0 + tl.exp(0.0 - other_log_prob - tilt))
            elif WEIGHT == "iw":
                row_weight = tl.minimum(tl.maximum(tl.exp(log_ratio), ratio_min), ratio_max)
            else:
                tl.static_assert(WEIGHT == "psft")
                ratio = tl.exp(log_ratio)
                row_weight = tl.where(ratio < ratio_max, ratio, 0.0)
        row_weight = tl.maximum(row_weight, weight_floor)
        for index in tl.static_range(len(EXEMPT)):
            row_weight = tl.where(label == EXEMPT[index], 1.0, row_weight)
        row_weight = tl.where(trained, row_weight, 0.0)
        value = row_log_prob if CROSS_ENTROPY_VALUES else row_weight * row_log_prob
        tl.store(weight + token, row_weight, mask=exists)
        tl.store(loss + token, 0.0 - value, mask=exists)


@triton.jit(do_not_specialize=_INTEGERS)
def gradient_kernel(
    logits,
    gradient,
    labels,
    upstream,
    weight,
    row_coefficient,
    log_prob,
    maximum,
    sum_exp,
    num_tokens,
    inner_size,
    logits_outer_stride,
    logits_inner_stride,
    logits_column_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_column_stride,
    labels_outer_stride,
    labels_inner_stride,
    upstream_outer_stride,
    upstream_inner_stride,
    start,
    valid_columns,
    row_vectors,
    vocab_size,
    ROW_COEFFICIENT: tl.constexpr,  # whether the softmax has another factor than the weight
    CONTIGUOUS: tl.constexpr,  # both column strides are 1
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program per token: gradient = upstream (row_coefficient softmax - weight onehot), rounded once, by the store.

    `gradient` may be `logits`: each element is read and written by one lane, in this order.
    """
    # The rows that the forward kernel read last are still in the L2 cache: serve them first.
    token = num_tokens - 1 - tl.program_id(0)
    outer = (token // inner_size).to(tl.int64)
    inner = (token % inner_size).to(tl.int64)
    label = tl.load(labels + outer * labels_outer_stride + inner * labels_inner_stride)
    logits += (outer * logits_outer_stride + inner * logits_inner_stride) * VECTOR
    gradient += (outer * gradient_outer_stride + inner * gradient_inner_stride) * VECTOR
    # All before the first branch: a row waits for its few numbers once.
    row_upstream = tl.load(upstream + outer * upstream_outer_stride + inner * upstream_inner_stride)
    scale = tl.load(weight + token) * row_upstream
    row_max = tl.load(maximum + token)
    row_log_prob = tl.load(log_prob + token)
    target_value = scale * _expm1(row_log_prob)
    if ROW_COEFFICIENT:
        row_scale = tl.load(row_coefficient + token) * row_upstream
        target_value += (row_scale - scale) * tl.exp(row_log_prob)
        scale = row_scale
    softmax_scale = scale / tl.load(sum_exp + token)
    target = (label - start).to(tl.int32)
    tile = tl.arange(0, BLOCK)
    num_columns = row_vectors * VECTOR

    has_gradient = (label >= 0) & (label < vocab_size) & ((scale != 0) | (target_value != 0))
    # Before the branch: Triton 3.4 and 3.5 do not compile a loop whose bound a branch yields.
    first_zero = tl.where(has_gradient, tl.cdiv(valid_columns, BLOCK) * BLOCK, 0)
    if has_gradient:
        whole_blocks = valid_columns // BLOCK * BLOCK
        for first in range(0, whole_blocks, BLOCK):
            columns = first + tile
            x = tl.load(logits + _offsets(columns, logits_column_stride, CONTIGUOUS)).to(tl.float32)
            value = tl.exp2((x - row_max) * LOG2_E) * softmax_scale
            value = tl.where(columns == target, target_value, value)
            pointers = gradient + _offsets(columns, gradient_column_stride, CONTIGUOUS)
            tl.store(pointers, _rounded(value, gradient.dtype.element_ty))
        if whole_blocks < valid_columns:
            columns = whole_blocks + tile
            in_row = columns < row_vectors * VECTOR
            x = tl.load(logits + _offsets(columns, logits_column_stride, CONTIGUOUS), mask=in_row, other=LOWEST)
            value = tl.exp2((x.to(tl.float32) - row_max) * LOG2_E) * softmax_scale
            value = tl.where(columns == target, target_value, value)
            value = tl.where(columns < valid_columns, value, 0.0)
            pointers = gradient + _offsets(columns, gradient_column_stride, CONTIGUOUS)
            tl.store(pointers, _rounded(value, gradient.dtype.element_ty), mask=in_row)
    for first in range(first_zero, num_columns, BLOCK):
        columns = first + tile
        pointers = gradient + _offsets(columns, gradient_column_stride, CONTIGUOUS)
        tl.store(pointers, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=columns < num_columns)


@triton.jit(do_not_specialize=_INTEGERS)
def store_columns_kernel(
    gradient,
    columns,
    values,
    inner_size,
    gradient_outer_stride,
    gradient_inner_stride,
    column_stride,
    K: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per token: gradient[columns[k]] = values[k], rounded once; a column of -1 is left out."""
    token = tl.program_id(0).to(tl.int64)
    gradient += (token // inner_size) * gradient_outer_stride + (token % inner_size) * gradient_inner_stride
    lane = tl.arange(0, LANES)
    column = tl.load(columns + token * K + lane, mask=lane < K, other=-1)
    value = tl.load(values + token * K + lane, mask=lane < K, other=0.0)
    pointers = gradient + column * column_stride
    tl.store(pointers, _rounded(value, gradient.dtype.element_ty), mask=column >= 0)


@triton.jit
def _idft_weight(log_prob, entropy, beta, gamma_min, gamma_max, share):
    gamma = tl.minimum(tl.maximum(tl.exp(-(log_prob + entropy) / beta), gamma_min), gamma_max)
    return tl.exp((1.0 + share * (gamma - 1.0)) * log_prob)


@triton.jit
def _expm1(x):
    """exp(x) - 1, to fp32 precision near 0 as well, where the subtraction would cancel."""
    series = 1.0
    for n in tl.static_range(8, 1, -1):
        series = 1.0 + x / n * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """fp32 -> dtype, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)
