"""Examples: rows that are tokenised once, checked, counted, kept in memory.

Nothing disappears silently: every row is an example, or is counted and named
in the report as malformed, dropped or truncated. By default each of these is an
error before the first step.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data import sources as sources_lib
from posttrain.tasks import jsonl
from posttrain.text import render as render_lib
from posttrain.text import sandbox

PERCENTILES = (50, 90, 99)
SHOWN = 5  # Rows that an error message names.


@dataclasses.dataclass(frozen=True)
class Examples:
  """The examples of one source, with random access, for Grain.

  Attributes:
    source: the source of their rows.
    tokens: int32, all examples one after the other. One array rather than N:
      a Python object per example would need more memory than its tokens.
    loss_mask: bool, as `tokens`.
    offsets: [N + 1] int; example n is tokens[offsets[n]:offsets[n + 1]].
    counts: rows, examples, malformed, overlong, no_target, repeated_keys,
      unknown_tokens.
    malformed, dropped, truncated, repeated: place and reason of each such row;
      one entry for all rows of a damaged part of a file.
  """

  source: sources_lib.Source
  tokens: np.ndarray
  loss_mask: np.ndarray
  offsets: np.ndarray
  counts: dict[str, int]
  malformed: list[dict[str, str]]
  dropped: list[dict[str, str]]
  truncated: list[dict[str, str]]
  repeated: list[dict[str, str]]

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    part = slice(self.offsets[index], self.offsets[index + 1])
    return {"tokens": self.tokens[part], "loss_mask": self.loss_mask[part]}

  @property
  def sizes(self) -> np.ndarray:
    """Number of tokens of each example, [N]."""
    return np.diff(self.offsets)

  def checksum(self, start: int) -> int:
    """Computes the CRC-32 of all examples, continued from `start`."""
    for array in (self.tokens, self.loss_mask, self.offsets):
      start = zlib.crc32(array.tobytes(), start)
    return start


def load(
    source: sources_lib.Source, renderer: render_lib.Renderer, *,
    sequence_length: int, on_overlong: str = "error",
    on_no_target: str = "error", on_malformed: str = "error",
) -> Examples:
  """Reads and tokenises a source.

  Args:
    sequence_length: most tokens of an example.
    on_overlong: "error", "drop" or "truncate", which keeps EOS.
    on_no_target: "error" or "drop".
    on_malformed: "error" or "skip".

  Raises:
    ValueError: the source cannot be read, or rows are not as the config
      allows; the message names them.
  """
  _check_choice("on_overlong", on_overlong, ("error", "drop", "truncate"))
  _check_choice("on_no_target", on_no_target, ("error", "drop"))
  _check_choice("on_malformed", on_malformed, ("error", "skip"))
  rows = num_malformed = 0
  kept: list[tuple[np.ndarray, np.ndarray]] = []
  malformed, overlong, no_target, truncated = [], [], [], []
  repeated = []
  for place, row in sources_lib.read(source):
    example = _render(place, row, renderer)
    if isinstance(example, sources_lib.Fault):
      malformed.append(_entry(place, example.reason))
      num_malformed += example.rows
      rows += example.rows
      continue
    rows += 1
    if isinstance(row, jsonl.Repeated):
      repeated.append(_entry(place, ", ".join(row.keys_twice)))
    tokens, loss_mask = example
    size = tokens.size
    if size > sequence_length:
      overlong.append(_entry(place, f"{size} tokens"))
      if on_overlong != "truncate":
        continue
      # Before the check for targets: a cut may leave none.
      tokens, loss_mask = truncate(tokens, loss_mask, sequence_length)
    if not loss_mask.any():
      no_target.append(_entry(place, "no target token" + (
          f" in the first {sequence_length}" if size > sequence_length
          else "")))
      continue
    if size > sequence_length:
      truncated.append(_entry(place, f"{size} tokens, kept {tokens.size}"))
    kept.append((tokens, loss_mask))
  if on_malformed == "error":
    _require_none(
        malformed, rows, "cannot be used",
        'Correct them, or set data.on_malformed="skip".', num_malformed)
  if on_overlong == "error":
    _require_none(
        overlong, rows, f"have more than sequence_length={sequence_length} "
        "tokens", 'Raise sequence_length, or set data.on_overlong to "drop" '
        'or "truncate".')
  if on_no_target == "error":
    _require_none(
        no_target, rows, "have no token in the loss",
        'Correct them, or set data.on_no_target="drop".')
  dropped = no_target + (overlong if on_overlong == "drop" else [])
  counts = dict(
      rows=rows, examples=len(kept), malformed=num_malformed,
      overlong=len(overlong), no_target=len(no_target),
      repeated_keys=len(repeated))
  return _collect(
      source, kept, renderer.tokenizer.unk_id, counts, malformed=malformed,
      dropped=dropped, truncated=truncated, repeated=repeated)


def truncate(
    tokens: np.ndarray, loss_mask: np.ndarray, length: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts an example to at most `length` tokens, so that it still ends a turn.

  A turn that is cut keeps its end-of-turn token as its last one: otherwise the
  model would learn not to stop. A cut outside a turn goes back to the end of
  the turn before.

  Args:
    tokens: [n] int32, longer than `length`.
    loss_mask: [n] bool.
    length: at least 2.

  Returns:
    Both, cut; no token is in the loss if no turn begins before the cut.
  """
  head = loss_mask[:length - 1]
  if head.size and head[-1] and loss_mask[length - 1]:
    # The cut is inside a turn: its last target is its end-of-turn token.
    later = np.flatnonzero(~loss_mask[length - 1:])
    end = length - 1 + later[0] if later.size else tokens.size
    return (np.append(tokens[:length - 1], tokens[end - 1]),
            np.append(head, True))
  targets = np.flatnonzero(head)
  end = targets[-1] + 1 if targets.size else length - 1
  return tokens[:end], loss_mask[:end]


def report(examples: Sequence[Examples]) -> dict[str, Any]:
  """Summarises the examples for `data_report.json`. JSON-able."""
  sizes = np.concatenate([part.sizes for part in examples])
  targets = sum(int(part.loss_mask.sum()) for part in examples)
  weights = sum(part.source.weight for part in examples)
  total = {
      key: sum(part.counts[key] for part in examples)
      for key in examples[0].counts}
  lengths = dict(
      min=int(sizes.min()), mean=float(sizes.mean()), max=int(sizes.max()),
      **{f"p{p}": float(np.percentile(sizes, p)) for p in PERCENTILES})
  return total | dict(
      tokens=int(sizes.sum()), target_tokens=targets,
      target_token_share=targets / int(sizes.sum()), lengths=lengths,
      sources=[
          dict(name=part.source.name,
               share_of_mixture=part.source.weight / weights, **part.counts)
          for part in examples],
      malformed_rows=[row for part in examples for row in part.malformed],
      dropped_rows=[row for part in examples for row in part.dropped],
      truncated_rows=[row for part in examples for row in part.truncated],
      repeated_key_rows=[row for part in examples for row in part.repeated])


def warnings(examples: Sequence[Examples]) -> list[str]:
  """Lists warnings about data that are used as they are."""
  found = []
  for part in examples:
    name, unknown = part.source.name, part.counts["unknown_tokens"]
    if unknown:
      found.append(
          f"{name}: {unknown:,} of {part.tokens.size:,} tokens "
          f"({unknown / part.tokens.size:.1%}) stand for text that this "
          "tokenizer cannot spell, which is lost. Use another tokenizer "
          "(tokenizer), or correct the data.")
    if part.repeated:
      first = part.repeated[0]
      found.append(
          f"{name}: {len(part.repeated):,} rows name a key twice, and the last "
          f"value counts. The first is {first['place']}: {first['reason']}.")
  return found


def _render(
    place: str, row: dict | sources_lib.Fault, renderer: render_lib.Renderer,
) -> tuple[np.ndarray, np.ndarray] | sources_lib.Fault:
  """Tokenises a row; returns a Fault if it is malformed."""
  if isinstance(row, sources_lib.Fault):
    return row
  try:
    return renderer.example_tokens(row)
  # The template is at fault, and not this row: the others would fail too.
  except sandbox.TemplateLimitError as error:
    raise ValueError(f"{place}: {error}") from error
  except ValueError as error:
    return sources_lib.Fault(str(error))


def _collect(source, kept, unk_id, counts, **lists) -> Examples:
  tokens = np.concatenate([t for t, _ in kept] or [np.zeros(0, np.int32)])
  unknown = 0 if unk_id is None else int((tokens == unk_id).sum())
  return Examples(
      source=source, tokens=tokens,
      loss_mask=np.concatenate([m for _, m in kept] or [np.zeros(0, bool)]),
      offsets=np.cumsum([0, *(t.size for t, _ in kept)]),
      counts=counts | dict(unknown_tokens=unknown), **lists)


def _entry(place: str, reason: str) -> dict[str, str]:
  return dict(place=place, reason=reason)


def _require_none(
    entries: list[dict[str, str]], rows: int, what: str, remedy: str,
    count: int | None = None) -> None:
  """Raises ValueError if there are entries; `count` is their number of rows."""
  if not entries:
    return
  named = "; ".join(f"{e['place']}: {e['reason']}" for e in entries[:SHOWN])
  more = f"; and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
  raise ValueError(
      f"{count or len(entries)} of {rows} rows {what} ({named}{more}). "
      f"{remedy}")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(
        f"data.{key}={value!r} is not one of {', '.join(choices)}.")
