"""GGUF's block formats as scalar loops, from their definitions in ggml.

Each function takes one block's bytes and gives its weights, in the order of
the C structs and loops: `d` and `dmin` are half-precision scales, small
integers are packed low half first.

Source: ggml, `ggml-common.h` (the structs) and `ggml-quants.c`.
"""

import struct

import numpy as np

F = np.float32


def half(block: bytes, at: int) -> np.float32:
  return F(struct.unpack_from("<e", block, at)[0])


def signed(byte: int) -> int:
  return byte - 256 if byte > 127 else byte


def q8_0(block):
  """d, 32 signed bytes."""
  return [half(block, 0) * F(signed(byte)) for byte in block[2:34]]


def q4_0(block):
  """d, 16 bytes: weight i in the low half of byte i, i + 16 in the high."""
  d, qs = half(block, 0), block[2:18]
  return ([d * F((q & 15) - 8) for q in qs]
          + [d * F((q >> 4) - 8) for q in qs])


def q4_1(block):
  """d, m, 16 bytes."""
  d, m, qs = half(block, 0), half(block, 2), block[4:20]
  return ([d * F(q & 15) + m for q in qs] + [d * F(q >> 4) + m for q in qs])


def fifth_bits(block, at):
  bits = struct.unpack_from("<I", block, at)[0]
  return [(bits >> i & 1) << 4 for i in range(32)]


def q5_0(block):
  """d, 32 fifth bits, 16 bytes."""
  d, high, qs = half(block, 0), fifth_bits(block, 2), block[6:22]
  low = [q & 15 for q in qs] + [q >> 4 for q in qs]
  return [d * F((a | b) - 16) for a, b in zip(low, high, strict=True)]


def q5_1(block):
  """d, m, 32 fifth bits, 16 bytes."""
  d, m = half(block, 0), half(block, 2)
  high, qs = fifth_bits(block, 4), block[8:24]
  low = [q & 15 for q in qs] + [q >> 4 for q in qs]
  return [d * F(a | b) + m for a, b in zip(low, high, strict=True)]


def q2_k(block):
  """16 scales and minima of 4 bits, 256 weights of 2, d, dmin."""
  scales, qs = block[:16], block[16:80]
  d, dmin = half(block, 80), half(block, 82)
  out, group = [], 0
  for at in (0, 32):  # 128 weights out of 32 bytes.
    for shift in (0, 2, 4, 6):
      for part in (0, 16):
        scale = d * F(scales[group] & 15)
        least = dmin * F(scales[group] >> 4)
        out += [scale * F(qs[at + part + i] >> shift & 3) - least
                for i in range(16)]
        group += 1
  return out


def q3_k(block):
  """256 third bits, 256 weights of 2 bits, 16 scales of 6 bits, d."""
  high, qs, packed = block[:32], block[32:96], block[96:108]
  d = half(block, 108)
  scales = [
      (packed[i % 8] >> 4 * (i // 8) & 15
       | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32
      for i in range(16)]
  out, group, bit = [], 0, 0
  for at in (0, 32):
    for shift in (0, 2, 4, 6):
      for part in (0, 16):
        scale = d * F(scales[group])
        for i in range(part, part + 16):
          low = qs[at + i] >> shift & 3
          out.append(scale * F(low - (0 if high[i] >> bit & 1 else 4)))
        group += 1
      bit += 1
  return out


def scale_and_min(packed, i):
  """Scales and minima of eight groups of Q4_K and Q5_K: six bits, twelve bytes.
  """
  if i < 4:
    return packed[i] & 63, packed[i + 4] & 63
  return ((packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4,
          (packed[i + 4] >> 4) | (packed[i] >> 6) << 4)


def q4_k(block):
  """d, dmin, 8 scales and minima of 6 bits, 256 weights of 4."""
  d, dmin, packed, qs = half(block, 0), half(block, 2), block[4:16], block[16:]
  out = []
  for group in range(8):  # Of 32; two groups share 32 bytes.
    scale, least = scale_and_min(packed, group)
    scale, least = d * F(scale), dmin * F(least)
    at, shift = 32 * (group // 2), 4 * (group % 2)
    out += [scale * F(qs[at + i] >> shift & 15) - least for i in range(32)]
  return out


def q5_k(block):
  """Q4_K with a fifth bit of each weight."""
  d, dmin, packed = half(block, 0), half(block, 2), block[4:16]
  high, qs = block[16:48], block[48:]
  out = []
  for group in range(8):
    scale, least = scale_and_min(packed, group)
    scale, least = d * F(scale), dmin * F(least)
    at, shift = 32 * (group // 2), 4 * (group % 2)
    for i in range(32):
      q = qs[at + i] >> shift & 15 | (high[i] >> group & 1) << 4
      out.append(scale * F(q) - least)
  return out


def q6_k(block):
  """256 low halves, 256 pairs of high bits, 16 signed scales, d."""
  d = half(block, 208)
  scales = [signed(byte) for byte in block[192:208]]
  out = []
  for part in range(2):  # 128 weights each.
    low, high = block[64 * part:64 * part + 64], block[128 + 32 * part:]
    for quarter in range(4):
      for i in range(32):
        nibble = low[i + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        q = nibble | (high[i] >> 2 * quarter & 3) << 4
        scale = scales[8 * part + 2 * quarter + i // 16]
        out.append(d * F(scale) * F(q - 32))
  return out


# By name: the loop, weights of a block, its bytes, where its halves are.
FORMATS = {
    "Q8_0": (q8_0, 32, 34, (0,)), "Q4_0": (q4_0, 32, 18, (0,)),
    "Q4_1": (q4_1, 32, 20, (0, 2)), "Q5_0": (q5_0, 32, 22, (0,)),
    "Q5_1": (q5_1, 32, 24, (0, 2)), "Q2_K": (q2_k, 256, 84, (80, 82)),
    "Q3_K": (q3_k, 256, 110, (108,)), "Q4_K": (q4_k, 256, 144, (0, 2)),
    "Q5_K": (q5_k, 256, 176, (0, 2)), "Q6_K": (q6_k, 256, 210, (208,)),
}
