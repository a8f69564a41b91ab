"""SFT, RL and forced evaluation where no token is a delimiter.

A first run learns ordinary text, in which BPE merges across "</think>". A
second one goes on from it with thinking strings: its model writes delimiters
that no ids would find. Oracles: `str.split`, ids that are spelt by hand, and
the training program's own logprobs.
"""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import pipeline
from posttrain.episodes import rollouts as episode_rollouts
from posttrain.episodes.episode_sampler import EpisodeSampler
from posttrain.model import token_logprobs
from posttrain.rl import experience
from posttrain.sampler import budget_state as budget
from posttrain.sampler import transcript
from posttrain.stages import sft
from posttrain.text import thinking
from tests import meshes
from tests.stages import merged

pytestmark = pytest.mark.slow
HERE = "tests.stages.merged"
START, END, WAIT, FINAL = "<think>", "</think>", " Wait", "\nThe answer"
OTHER = "and"  # Ends the thinking too, in a token that begins with a space.
MINIMUM = 3
ROLLOUT = dict(max_prompt_tokens=16, max_tokens=48, chunk=16)
CONFIG = dict(
    model_overrides=dict(
        layers=1, embed=48, mlp=96, heads=4, kv_heads=2, head_dim=12),
    chat_template="plain", thinking=dict(end=""), stages=("write",),
    write=dict(
        kind="sft", num_steps=110, rows=8, sequence_length=96,
        learning_rate=1e-2, log_every=20,
        data=dict(sources=(dict(task=f"{HERE}:demonstrations"),))))
RL = dict(
    kind="rl", num_groups=6, group_size=4, sequence_length=64,
    rows_per_microbatch=4, learning_rate=1e-4,
    problems=dict(task=f"{HERE}:problems"), rewards=(f"{HERE}:reward",),
    log_every=1, show_sample_every=0)
THINKS = CONFIG | dict(
    thinking=dict(start=START, end=END, delimiters=(OTHER,), wait_text=WAIT,
                  final_answer=FINAL),
    stages=("cold_start", "reason", "least", "measure"),
    cold_start=CONFIG["write"] | dict(
        num_steps=2, learning_rate=1e-4, log_every=1),
    reason=RL | dict(
        num_steps=2,
        rollout=ROLLOUT | dict(num_waits=1, max_thinking_tokens=24)),
    least=RL | dict(
        num_steps=1, rollout=ROLLOUT | dict(
            min_thinking_tokens=MINIMUM, max_thinking_tokens=9)),
    measure=dict(
        kind="evaluate", problems=dict(task=f"{HERE}:problems", count=6),
        reward=f"{HERE}:reward", samples_per_problem=4,
        checkpoints=("init", "least"),
        max_thinking_tokens=(0, 3, 9), num_waits=(1, 2), rollout=ROLLOUT))
del THINKS["write"]


@dataclasses.dataclass
class Seen:
  """What the stages were given, in order."""

  rollouts: list = dataclasses.field(default_factory=list)
  batches: list = dataclasses.field(default_factory=list)
  prepared: list = dataclasses.field(default_factory=list)
  texts: list = dataclasses.field(default_factory=list)


def spy(patch, seen):
  """Keeps what passes; the stages are as they are."""
  run, stack = EpisodeSampler.run, sft.step.stack
  prepare, texts = experience.Preparation.__call__, transcript.texts

  def ran(self, model, problems, limits, **kwargs):
    found = run(self, model, problems, limits, **kwargs)
    seen.rollouts.append((jax.tree.map(np.asarray, model),
                          episode_rollouts.of_trajectories(found.trajectories),
                          limits))
    return found

  def stacked(batch, count):
    seen.batches.append(batch)
    return stack(batch, count)

  def prepared(self, rollouts, *args, **kwargs):
    found = prepare(self, rollouts, *args, **kwargs)
    seen.prepared.append((rollouts, found))
    return found

  def told(tokenizer, ids, rollouts, row):
    found = texts(tokenizer, ids, rollouts, row)
    seen.texts.append((rollouts, row, found))
    return found

  patch.setattr(EpisodeSampler, "run", ran)
  patch.setattr(sft.step, "stack", stacked)
  patch.setattr(experience.Preparation, "__call__", prepared)
  patch.setattr(transcript, "texts", told)


@pytest.fixture(scope="module")
def tokenizer():
  return merged.tokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
  return thinking.resolve(thinking.Thinking(**{
      "newline": "\n", **THINKS["thinking"]}), tokenizer)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="module")
def seen(root, tokenizer):
  seen = Seen()
  tokenizer.save(root / "tokenizer")
  own = dict(tokenizer=dict(path=str(root / "tokenizer")))
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: devices)
    pipeline.train(
        config_lib.assign(CONFIG | own, [], "test"), str(root / "a"))
    spy(patch, seen)
    patch.setenv(merged.GIVEN, str(root / "given.jsonl"))
    pipeline.train(config_lib.assign(THINKS | own | dict(init=dict(
        kind="workdir", path=str(root / "a"))), [], "test"), str(root / "b"))
  return seen


def contains(tokens, part):
  tokens, part = [*map(int, tokens)], [*part]
  return any(tokens[i:i + len(part)] == part for i in range(len(tokens)))


def completions(seen):
  """Yields rollouts, row, and token ids and provenance of each completion."""
  for _, found, _ in seen.rollouts:
    for row in range(len(found.tokens)):
      size = found.lengths[row]
      yield (found, row, found.tokens[row, :size].tolist(),
             found.provenance[row, :size].tolist())


def forced_runs(provenance):
  """Returns the ranges of indices of forced tokens."""
  edges = np.flatnonzero(np.diff(
      np.array([0, *provenance, 0]) == budget.FORCED))
  return [range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def heads(tokens, provenance, ids):
  """Returns indices of forced tokens whose text stood before a delimiter."""
  found = []
  for run in forced_runs(provenance):
    for part in (ids.wait, ids.end):
      for at in run[1:]:
        if tuple(tokens[at:at + len(part)]) == part and not (
            part == ids.end and tokens[at - 1] in ids.newline):
          found += range(run.start, at)
          break
  return found


def expected(text, opened):
  """Splits a completion as plain text: thinking, answer, and if it ended."""
  if not opened:
    before, start, rest = text.partition(START)
    if not start:
      return "", before, False
    text = rest
  thought, end, answer = text.partition(END)
  return thought, answer, bool(end)


def test_the_model_writes_delimiters_that_no_ids_would_find(
    seen, tokenizer, ids):
  """And all else that is tested below does happen."""
  found = dict.fromkeys(
      ("natural", "merged", "closed", "waits", "heads", "replaced", "open"), 0)
  for rollouts, row, tokens, provenance in completions(seen):
    end = rollouts.think_end[row]
    found["natural"] += end == budget.NATURAL
    found["merged"] += end == budget.NATURAL and not contains(tokens, ids.end)
    found["closed"] += end == budget.CLOSED
    found["open"] += end == budget.OPEN
    found["waits"] += rollouts.wait_count[row]
    found["heads"] += len(heads(tokens, provenance, ids))
    found["replaced"] += end == budget.NATURAL and any(
        tuple(tokens[run.start:run.stop])[-len(ids.end):] == ids.end
        for run in forced_runs(provenance))
  assert min(found.values()) > 5, found


def test_thinking_and_answer_are_those_of_the_text(
    root, seen, tokenizer, ids):
  """For the record, and for rewards; of every completion."""
  given = {tuple(json.loads(line)) for line in (
      root / "given.jsonl").read_text().splitlines()}
  checked = 0
  for rollouts, row, told in seen.texts:
    size = rollouts.lengths[row]
    tokens = rollouts.tokens[row, :size].tolist()
    text = told["text"]
    body = tokens[:-1] if tokens[-1] in tokenizer.stop_ids else tokens
    assert text == tokenizer.decode(body)
    opened = tokenizer.decode(rollouts.prompts[row]).endswith(START)
    thought, answer, ended = expected(text, opened)
    record = transcript.record(tokenizer, rollouts, row, ids)
    assert record["answer_text"] == told["answer"] == answer
    assert (told["answer"], told["thinking"], text) in given
    newline = thought.removesuffix("\n")
    if rollouts.think_end[row] != budget.CLOSED:
      assert told["thinking"] == thought
      assert ended == (rollouts.think_end[row] == budget.NATURAL)
    elif ended:  # A newline that was forced is no thinking.
      assert told["thinking"] in (thought, newline)
    else:
      assert rollouts.finish_name(row) == "length"
      assert thought.startswith(told["thinking"])
    begin = 0 if opened else text.find(START) + len(START)
    edges = [len(tokenizer.decode(tokens[:i])) for i in range(size + 1)]
    # A token counts if some of its text is thinking.
    assert rollouts.think_lengths[row] == sum(
        max(left, begin) < min(right, begin + len(told["thinking"]))
        for left, right in itertools.pairwise(edges))
    checked += 1
  assert checked > 300


def test_what_is_forced_is_a_string_of_the_config(seen, tokenizer, ids):
  """A head and a wait; a head and `end`; or a closing, or the rest of one."""
  closings = 0
  # A maximum may fall into a wait text, and never into a head.
  cut_wait = re.compile(r"[ .>\n]?( (W(a(it?)?)?)?)?\n?")
  for rollouts, row, tokens, provenance in completions(seen):
    for run in forced_runs(provenance):
      part = tuple(tokens[run.start:run.stop])
      cut = run.stop == len(tokens) and rollouts.finish_name(row) == "length"
      if cut:
        continue
      if part[-len(ids.final_answer):] == ids.final_answer:
        closing = part[:-len(ids.final_answer)]
        if closing[-len(ids.end):] == ids.end:
          before = tokenizer.decode(closing[:-len(ids.end)])
          assert cut_wait.fullmatch(before), before
        else:  # The model had begun it.
          rest = tokenizer.decode(closing)
          assert END.endswith(rest) and tokenizer.decode(
              tokens[:run.start]).endswith(END.removesuffix(rest))
        closings += 1
        continue
      tail = ids.wait if part[-len(ids.wait):] == ids.wait else ids.end
      assert part[-len(tail):] == tail
      head = tokenizer.decode(part[:-len(tail)])
      # It is the beginning of a token that a delimiter begins in.
      assert head in ("", " ", ".", ">", "\n"), head
  assert closings > 20


def logprobs_of(model, rollouts):
  """Computes the training program's logprobs [B, T] of the completions."""
  rows = [[*prompt, *tokens[:size]] for prompt, tokens, size in zip(
      rollouts.prompts, rollouts.tokens, rollouts.lengths, strict=True)]
  tokens = np.zeros((len(rows), 64), np.int32)
  for row, whole in zip(tokens, rows, strict=True):
    row[:len(whole)] = whole
  lengths = np.array([*map(len, rows)])
  places = np.broadcast_to(np.arange(64), tokens.shape).astype(np.int32)
  with jax.set_mesh(meshes.one()):
    found, _, _ = jax.jit(lambda model, batch: token_logprobs.token_logprobs(
        model, batch, chunk=64))(model, dict(
            tokens=tokens, positions=places,
            segment_ids=(places < lengths[:, None]).astype(np.int32)))
  result = np.zeros_like(rollouts.logprobs)
  for row, prompt in enumerate(rollouts.prompts):
    size = rollouts.lengths[row]
    result[row, :size] = np.asarray(found)[
        row, len(prompt):len(prompt) + size]
  return result


def test_the_training_programs_logprobs_agree(seen, tokenizer, ids):
  """Where nothing was banned; a ban makes a token more likely."""
  free = banned = 0
  for model, rollouts, limits in seen.rollouts:
    own = logprobs_of(model, rollouts)
    for row in range(len(own)):
      size = rollouts.lengths[row]
      provenance = rollouts.provenance[row, :size].tolist()
      tokens = rollouts.tokens[row, :size].tolist()
      may_ban = np.zeros(size, bool)
      for run in forced_runs(provenance):
        if tuple(tokens[run.start:run.stop])[-len(ids.wait):] == ids.wait:
          may_ban[run.stop:run.stop + 1] = True
      if limits.min_thinking_tokens:
        # The minimum holds back whole tokens of a delimiter that has begun.
        opened = tokenizer.decode(rollouts.prompts[row]).endswith(START)
        begin = 0 if opened else next(
            (i for i in range(size)
             if START in tokenizer.decode(tokens[:i + 1])), size)
        may_ban[begin:begin + 2 * MINIMUM + len(END)] = True
      may_ban &= np.array(provenance) == budget.SAMPLED
      gap = rollouts.logprobs[row, :size] - own[row, :size]
      np.testing.assert_allclose(gap[~may_ban], 0, atol=5e-5)
      assert (gap[may_ban] > -5e-5).all()
      free += (~may_ban).sum()
      banned += (gap[may_ban] > 1e-3).sum()
  assert free > 1000 and banned > 10, (free, banned)


def test_what_is_forced_is_in_no_loss(seen, ids):
  """Of heads too: RL learns from the tokens that were sampled, and no other."""
  found = 0
  for rollouts, prepared in seen.prepared:
    columns = prepared.experience
    for row in range(len(rollouts.tokens)):
      size = rollouts.lengths[row]
      tokens = rollouts.tokens[row, :size].tolist()
      provenance = rollouts.provenance[row, :size].tolist()
      packed = columns["completion_ids"] == row
      learnt = columns["tokens"][packed & columns["loss_mask"]].tolist()
      if not learnt:  # Its group has no signal.
        continue
      assert learnt == [token for token, code in zip(
          tokens, provenance, strict=True) if code == budget.SAMPLED]
      found += len(heads(tokens, provenance, ids))
  assert found > 5


def test_sft_shows_what_sampling_forces(seen, tokenizer, ids):
  """Each packed example is spelt by hand; so are prompts that open thinking."""
  end, start = [*ids.end], [*ids.start]
  plain = lambda text: tokenizer.encode(text)
  examples = {}
  for row in merged.demonstrations("train"):
    prompt = plain(row["prompt"].removesuffix(START))
    opened = row["prompt"].endswith(START)
    thought, answer = row["completion"].removeprefix(START).split(END)
    first, other, last = thought.partition(OTHER)
    completion = [
        *start * (not opened), *plain(first), *plain(other), *plain(last),
        *end, *plain(answer), tokenizer.eos_id]
    examples[*prompt, *start * opened, *completion] = (
        len(prompt) + len(start) * opened)
  checked = 0
  for batch in seen.batches:
    if "loss_mask" not in batch or "completion_ids" in batch:
      continue
    for tokens, segments, mask in zip(
        batch["tokens"], batch["segment_ids"], batch["loss_mask"],
        strict=True):
      for segment in range(1, segments.max() + 1):
        one = tuple(tokens[segments == segment].tolist())
        size = examples[one]
        assert mask[segments == segment].tolist() == [
            i >= size for i in range(len(one))]
        assert contains(one, end)
        checked += 1
  assert checked > 20
