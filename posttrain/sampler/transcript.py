"""Transcripts of completions: texts, and which part was sampled or forced."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from posttrain.sampler import budget_state
from posttrain.sampler import confidence as confidence_lib
from posttrain.sampler.confidence import Confidence
from posttrain.sampler.rollouts import THINK_ENDS, Rollouts
from posttrain.text import symbols, thinking
from posttrain.text.thinking import ThinkingIds
from posttrain.text.tokenizer import Tokenizer


def completion_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
  """Decodes a completion; delimiters stay visible, the final stop id goes."""
  tokens = list(tokens)
  if tokens and tokens[-1] in tokenizer.stop_ids:
    tokens = tokens[:-1]
  return tokenizer.decode(tokens)


def span_text(
    tokenizer: Tokenizer, tokens: Sequence[int], ids: ThinkingIds,
    span: thinking.Span,
) -> str:
  """Decodes a part of a completion as `completion_text` does the whole."""
  part = tokens[span.tokens]
  if not span.before and not span.after:
    return completion_text(tokenizer, part)
  if part and part[-1] in tokenizer.stop_ids:
    part = part[:-1]
  return symbols.decoded((
      *span.before, *(s for token in part for s in ids.tokens[token]),
      *span.after), tokenizer)


def split(
    rollouts: Rollouts, row: int, ids: ThinkingIds) -> thinking.Split:
  """Splits a completion into thinking and answer, by the sampler's record.

  A thinking section that the prompt opened counts too. Thinking that never
  ended has no answer; without thinking the whole completion is the answer.
  """
  tokens = rollouts.completion(row)
  return thinking.split(
      tokens, rollouts.provenance[row, :len(tokens)].tolist(), ids,
      in_thinking=bool(rollouts.in_thinking[row]),
      is_open=int(rollouts.think_end[row]) == budget_state.OPEN,
      length=int(rollouts.think_lengths[row]))


def segments(
    tokenizer: Tokenizer, tokens: Sequence[int], provenance: Sequence[int],
    ids: ThinkingIds, thought: slice = slice(0, 0),
) -> list[tuple[str, str]]:
  """Cuts a completion into runs, pairs of a text and where it came from.

  The second is "sampled", "thinking", "forced", "wait" or "observation".
  Forced tokens that spell a wait text are a wait. A wait that a maximum cut
  short is told from a closing by its first tokens.

  Args:
    tokenizer: decodes the runs.
    tokens, provenance: of one completion, see `Rollouts`.
    ids: the thinking strings.
    thought: tokens sampled within this slice are "thinking".
  """
  names: list[str] = []
  for start, stop, code in _runs(list(provenance)):
    if code == budget_state.OBSERVATION:
      names += ["observation"] * (stop - start)
      continue
    if code != budget_state.FORCED:
      inside = range(len(tokens))[thought]
      names += ["thinking" if i in inside else "sampled"
                for i in range(start, stop)]
      continue
    names += _forced_names(tuple(tokens[start:stop]), ids)
  # Differences of decoded prefixes: a tokenizer may drop a leading space, or
  # need several tokens for one character.
  texts, done = [], ""
  for _, stop, name in _runs(names):
    text = tokenizer.decode(list(tokens[:stop]))
    texts.append((text[len(done):], name))
    done = text
  return texts


def _forced_names(run: tuple[int, ...], ids: ThinkingIds) -> list[str]:
  """Names each token of a run of forced ones "wait" or "forced".

  A wait may follow text that stood before a delimiter in one token. Behind
  `end` there is no wait.
  """
  waits = sorted(filter(None, (ids.wait, *ids.more_waits)), key=len)
  begins = lambda at, part: run[at:at + len(part)] == part
  names: list[str] = []
  while len(names) < len(run):
    at = len(names)
    wait = next((w for w in reversed(waits) if begins(at, w)), ())
    if not wait and begins(at, ids.end):
      break
    names += ["wait"] * len(wait) or ["forced"]
  if "wait" not in names:  # One that was cut short.
    spelt = max((  # The length of what the two begin with in common.
        sum(itertools.takewhile(bool, map(operator.eq, run, wait)))
        for wait in waits), default=0)
    names[:spelt] = ["wait"] * spelt
  return names + ["forced"] * (len(run) - len(names))


def _runs(values: list) -> list[tuple[int, int, Any]]:
  """Returns (start, stop, value) of every run of equal values."""
  starts = [i for i, value in enumerate(values)
            if i == 0 or value != values[i - 1]]
  return [(start, stop, values[start])
          for start, stop in itertools.pairwise([*starts, len(values)])]


def record(
    tokenizer: Tokenizer, rollouts: Rollouts, row: int, ids: ThinkingIds,
    confidence: Confidence | None = None, answer: str | None = None,
) -> dict[str, Any]:
  """Makes the JSON record of one completion, for the saved samples.

  Args:
    confidence: settings of the sampler; None where it was off.
    answer: the text that rewards are given as `completion`; None: what is
      behind the thinking of a row of one turn.
  """
  tokens = rollouts.completion(row)
  provenance = rollouts.provenance[row, :len(tokens)].tolist()
  if answer is None:
    answer = span_text(
        tokenizer, tokens, ids, split(rollouts, row, ids).answer)
  return {
      "prompt_id": int(rollouts.prompt_id[row]),
      "sample_id": int(rollouts.sample_id[row]),
      "prompt": tokenizer.decode(rollouts.prompts[row]),
      "completion": completion_text(tokenizer, tokens),
      "answer_text": answer,
      "segments": segments(tokenizer, tokens, provenance, ids),
      "finish_reason": rollouts.finish_name(row),
      "think_end": THINK_ENDS[int(rollouts.think_end[row])],
      "think_length": int(rollouts.think_lengths[row]),
      "think_steps": int(rollouts.think_steps[row]),
      "answer_length": int(rollouts.answer_lengths[row]),
      "length": len(tokens),
      "wait_count": int(rollouts.wait_count[row]),
      **_measured(rollouts, row, confidence)}


def _measured(
    rollouts: Rollouts, row: int, settings: Confidence | None,
) -> dict[str, float | None]:
  """Summarises entropy and confidence of a row's sampled tokens."""
  if settings is None or rollouts.entropy is None or (
      rollouts.confidence is None):  # Drawn before a restart turned it on.
    return {}
  sampled = rollouts.loss_mask[row]
  return confidence_lib.summary(
      rollouts.entropy[row, sampled], rollouts.confidence[row, sampled],
      settings.window)


def texts(
    tokenizer: Tokenizer, ids: ThinkingIds, rollouts: Rollouts, row: int,
) -> dict[str, str]:
  """Decodes a completion: its "text", and "thinking" and "answer" in it.

  They are cut where the sampler's own record has the thinking end.
  """
  tokens = rollouts.completion(row)
  parts = split(rollouts, row, ids)
  return {"text": completion_text(tokenizer, tokens)} | {
      name: span_text(tokenizer, tokens, ids, getattr(parts, name))
      for name in ("thinking", "answer")}
