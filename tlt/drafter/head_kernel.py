"""A pass of an EAGLE head over a few rows as one compiled function, for a CPU.

A pass over few rows reads each weight once and does little with it; in torch half of its time is the calling of
ninety operations. A matrix is a pair of weights and a scale for each column of its output: float32 with scales of 1,
or int8, half of what bfloat16 takes to read. The cache is float32, or bfloat16 as its bits; all else is float32.

Shapes: T rows, B of them queries, H hidden, h heads, g key-value heads, D head dimension, S slots.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tlt.spec.compiled import compiled_sums

ZERO = np.float32(0)


@intrinsic
def widened(typing_context, value):
    """float32 of a float32, of an int8, or of the bits of a bfloat16 (uint16)."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]
    if value == types.int8:
        return types.float32(value), lambda context, builder, signature, args: builder.sitofp(args[0], ir.FloatType())

    def bits_of_float(context, builder, signature, args):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), bits_of_float


@intrinsic
def narrowed(typing_context, value, like):
    """A float32 as `like` is: itself, or the bits of the nearest bfloat16, ties to even. Not for NaN."""
    if like == types.float32:
        return types.float32(types.float32, like), lambda context, builder, signature, args: args[0]

    def nearest_bits(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), nearest_bits


@intrinsic
def power_of_two(typing_context, exponent):
    """2 ** exponent as float32, of an int32 from -126 to 127."""

    def bits_of_float(context, builder, signature, args):
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), bits_of_float


@compiled_sums
def exp(x):
    """Within 2e-7 of it (relative), for x up to 88; the C library's has no vectors. Polynomial of Cephes' expf."""
    x = max(x, np.float32(-87))
    exponent = np.float32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    x = x - exponent * np.float32(0.693359375) + exponent * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * x + np.float32(1.3981999507e-3)
    series = series * x + np.float32(8.3334519073e-3)
    series = series * x + np.float32(4.1665795894e-2)
    series = series * x + np.float32(1.6666665459e-1)
    series = series * x + np.float32(5.0000001201e-1)
    return (series * x * x + x + np.float32(1)) * power_of_two(np.int32(exponent))


@compiled_sums
def exponentials(values, temperature):
    """Replace values [N] by exp((value - the largest) / temperature); their sum. By it they are a softmax."""
    largest, total = values[0], ZERO
    for index in range(values.shape[0]):
        largest = max(largest, values[index])
    for index in range(values.shape[0]):
        values[index] = exp((values[index] - largest) / temperature)
        total += values[index]
    return total


@compiled_sums
def project(matrix, rows, output):
    """rows [T, K] times a matrix [N, K] and scales [N] into output [T, N]. Two columns and up to four rows share what
    is read."""
    weight, scales = matrix
    num_rows, num_columns, size = rows.shape[0], weight.shape[0], weight.shape[1]
    for begin in range(0, num_columns, 2):
        column = min(begin, num_columns - 2)  # an odd last column is computed with the one before it
        left, right = weight[column], weight[column + 1]
        near, far = scales[column], scales[column + 1]
        row = 0
        while row + 4 <= num_rows:
            one, two, three, four = rows[row], rows[row + 1], rows[row + 2], rows[row + 3]
            a, b, c, d, e, f, g, h = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
            for index in range(size):
                x, y = widened(left[index]), widened(right[index])
                a += x * one[index]
                b += x * two[index]
                c += x * three[index]
                d += x * four[index]
                e += y * one[index]
                f += y * two[index]
                g += y * three[index]
                h += y * four[index]
            output[row, column], output[row, column + 1] = near * a, far * e
            output[row + 1, column], output[row + 1, column + 1] = near * b, far * f
            output[row + 2, column], output[row + 2, column + 1] = near * c, far * g
            output[row + 3, column], output[row + 3, column + 1] = near * d, far * h
            row += 4
        while row + 2 <= num_rows:
            one, two = rows[row], rows[row + 1]
            a, b, e, f = ZERO, ZERO, ZERO, ZERO
            for index in range(size):
                x, y = widened(left[index]), widened(right[index])
                a += x * one[index]
                b += x * two[index]
                e += y * one[index]
                f += y * two[index]
            output[row, column], output[row, column + 1] = near * a, far * e
            output[row + 1, column], output[row + 1, column + 1] = near * b, far * f
            row += 2
        if row < num_rows:
            one, a, e = rows[row], ZERO, ZERO
            for index in range(size):
                a += widened(left[index]) * one[index]
                e += widened(right[index]) * one[index]
            output[row, column], output[row, column + 1] = near * a, far * e


@compiled_sums
def rotate(row, cos, sin):
    """Rotary embedding of all heads of one row [heads x D], in place; cos and sin [D / 2] of its position."""
    half = cos.shape[0]
    for begin in range(0, row.shape[0], 2 * half):
        for index in range(begin, begin + half):
            first, second = row[index], row[index + half]
            row[index] = first * cos[index - begin] - second * sin[index - begin]
            row[index + half] = second * cos[index - begin] + first * sin[index - begin]


@compiled_sums
def write_rows(rows, slots, cache):
    """rows [T, g x D] to their slots of the cache [S, g, D]."""
    num_heads, size = cache.shape[1], cache.shape[2]
    for row in range(rows.shape[0]):
        for head in range(num_heads):
            for index in range(size):
                value = rows[row, head * size + index]
                cache[slots[row], head, index] = narrowed(value, cache[0, 0, 0])


@compiled_sums
def attend(queries, keys, values, block_table, block_size, seq_lens, output):
    """Attention of one query [h x D] a sequence, its last token, over `seq_lens` [B] slots; all [B, h x D]."""
    num_groups, size = keys.shape[1], keys.shape[2]
    num_heads = queries.shape[1] // size
    scale = np.float32(1 / math.sqrt(size))
    for row in range(queries.shape[0]):
        seq_len = seq_lens[row]
        slots = np.empty(seq_len, np.int64)
        for position in range(seq_len):
            block = np.int64(block_table[row, position // block_size])
            slots[position] = block * block_size + position % block_size
        scores = np.empty(seq_len, np.float32)
        for head in range(num_heads):
            group = head * num_groups // num_heads
            query = queries[row, head * size : (head + 1) * size]
            mixed = output[row, head * size : (head + 1) * size]
            for position in range(seq_len):
                key, total = keys[slots[position], group], ZERO
                for index in range(size):
                    total += query[index] * widened(key[index])
                scores[position] = total * scale
            norm = exponentials(scores, np.float32(1))
            mixed[:] = ZERO
            for position in range(seq_len):
                share = scores[position]
                value = values[slots[position], group]
                for index in range(size):
                    mixed[index] += share * widened(value[index])
            for index in range(size):
                mixed[index] /= norm


@compiled_sums
def head_pass(
    embeddings, hidden, position_ids, slots, queries, block_table, block_size, seq_lens,
    fc_embeddings, fc_hidden, q_proj, k_proj, v_proj, o_proj, norm, eps, gate_proj, up_proj, down_proj,
    cos, sin, keys, values,
):  # fmt: skip
    """`EagleHead.forward` [B, H] of rows whose inputs are embeddings and hidden [T, H], at `position_ids` [T].

    Keys and values of all rows go to their slots [T] of the cache [S, g, D]; `queries` [B] are the rows that attend,
    each to the first `seq_lens` [B] positions of its sequence, which lie in `block_table` [B, blocks].
    """
    num_rows, num_queries = hidden.shape[0], queries.shape[0]
    mixed = np.empty(hidden.shape, np.float32)
    project(fc_embeddings, embeddings, mixed)
    of_hidden = np.empty(hidden.shape, np.float32)
    project(fc_hidden, hidden, of_hidden)
    mixed += of_hidden
    key_rows = np.empty((num_rows, k_proj[0].shape[0]), np.float32)
    value_rows = np.empty((num_rows, v_proj[0].shape[0]), np.float32)
    project(k_proj, mixed, key_rows)
    project(v_proj, mixed, value_rows)
    for row in range(num_rows):
        rotate(key_rows[row], cos[position_ids[row]], sin[position_ids[row]])
    write_rows(key_rows, slots, keys)
    write_rows(value_rows, slots, values)
    x = mixed[queries]
    query_rows = np.empty((num_queries, q_proj[0].shape[0]), np.float32)
    project(q_proj, x, query_rows)
    for row in range(num_queries):
        position = position_ids[queries[row]]
        rotate(query_rows[row], cos[position], sin[position])
    attended = np.empty(query_rows.shape, np.float32)
    attend(query_rows, keys, values, block_table, block_size, seq_lens, attended)
    output = np.empty(x.shape, np.float32)
    project(o_proj, attended, output)
    output += x
    normed = np.empty(x.shape, np.float32)
    for row in range(num_queries):
        squares = ZERO
        for index in range(x.shape[1]):
            squares += output[row, index] * output[row, index]
        factor = np.float32(1 / math.sqrt(squares / np.float32(x.shape[1]) + eps))
        for index in range(x.shape[1]):
            normed[row, index] = output[row, index] * factor * norm[index]
    gate = np.empty((num_queries, gate_proj[0].shape[0]), np.float32)
    up = np.empty(gate.shape, np.float32)
    project(gate_proj, normed, gate)
    project(up_proj, normed, up)
    for row in range(num_queries):
        for index in range(gate.shape[1]):
            value = gate[row, index]
            gate[row, index] = value / (np.float32(1) + exp(min(-value, np.float32(80)))) * up[row, index]
    project(down_proj, gate, x)
    output += x
    return output


@compiled_sums
def read_out(matrix, hidden, temperatures):
    """[B, V] float32: softmax of hidden [B, H] times the matrix [V, H] over temperatures [B] float32."""
    probs = np.empty((hidden.shape[0], matrix[0].shape[0]), np.float32)
    project(matrix, hidden, probs)
    for row in range(probs.shape[0]):
        probs[row] /= exponentials(probs[row], temperatures[row])
    return probs
