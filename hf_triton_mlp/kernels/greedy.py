"""The next token of each text, the first of the greatest logits, and whether it ends the text."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: The greatest number of float32, in the place of infinity, which stands for NaN.
MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def greatest_logits_kernel(
    logits_ptr,
    values_ptr,
    places_ptr,
    vocabulary,
    stride_logits,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The greatest of BLOCK logits of a text, and its place; the first one, NaN before all others.

    logits: (batch, vocabulary), unit stride along the vocabulary; values (float32), places (int32):
    (batch, chunks). Program (chunk, text).
    """
    chunk, text = tl.program_id(0), tl.program_id(1)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logits_ptr += text.to(tl.int64) * stride_logits
    logits = tl.load(logits_ptr + offs, mask=offs < vocabulary, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), tl.minimum(logits, MOST))
    value, place = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = text * tl.num_programs(0) + chunk
    tl.store(values_ptr + out, value)
    tl.store(places_ptr + out, chunk * BLOCK + place)


@triton.jit
def next_token_kernel(
    values_ptr,
    places_ptr,
    ends_ptr,
    pad_ptr,
    token_ptr,
    unfinished_ptr,
    report_ptr,
    length_ptr,
    positions_ptr,
    chunks,
    ends,
    CHUNKS: tl.constexpr,
    ENDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """token = the place of the greatest value, the padding for a text that has ended; and so on.

    values, places: (batch, chunks); ends: (ends,), the tokens that end a text, pad: one token, and
    unfinished: (batch,) booleans, which this text's token may end; token: (batch,); report:
    (2, batch), the tokens and which texts go on; length, and positions (batch,) or None, go up by
    one. All other integers are int64. Program (text).
    """
    text, batch = tl.program_id(0), tl.num_programs(0)
    offs = tl.arange(0, CHUNKS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(values_ptr + text * chunks + offs, mask=offs < chunks, other=float("-inf"))
    best = tl.argmax(values, axis=0, tie_break_left=True)
    token = tl.load(places_ptr + text * chunks + best).to(tl.int64)
    goes_on = tl.load(unfinished_ptr + text) != 0
    if ENDS > 0:
        token = tl.where(goes_on, token, tl.load(pad_ptr))
        each = tl.arange(0, ENDS)
        found = tl.load(ends_ptr + each, mask=each < ends, other=-1) == token
        goes_on = goes_on & (tl.sum(found.to(tl.int32), axis=0) == 0)
        tl.store(unfinished_ptr + text, goes_on)
    tl.store(token_ptr + text, token)
    tl.store(report_ptr + text, token)
    tl.store(report_ptr + batch + text, goes_on.to(tl.int64))
    if positions_ptr is not None:
        tl.store(positions_ptr + text, tl.load(positions_ptr + text) + 1)
    if text == 0:
        tl.store(length_ptr, tl.load(length_ptr) + 1)
