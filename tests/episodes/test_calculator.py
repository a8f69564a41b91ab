"""Oracle: the conversation as one text, encoded and masked by hand."""

import dataclasses
import functools

import numpy as np
import pytest

from posttrain.episodes import rollouts
from posttrain.episodes.calculator import calculator
from posttrain.episodes.calls import Calls
from posttrain.episodes.driver import Driver
from posttrain.episodes.protocol import is_multi_turn, make_tasks
from posttrain.episodes.workers import Settings, WorkerPool
from posttrain.text import render, symbols
from tests.episodes import scene
from tests.model import build as models
from tests.sampler import engine_scene
from tests.sampler.forcing import Strings
from tests.text import build

# What the model is made to write in each turn, by the number of its problem.
pytestmark = pytest.mark.usefixtures("one_device")
WRITES = [
    ["so <calc> 2 * 3 </calc>", "so 6 </s>"],
    ["<calc> ( 1 + 3 ) / 2 </calc>", "is <calc> 2 + 2 </calc>",
     "then 4 </s>"],
    ["well </s>"],
    ["<calc> so </calc>", "no </s>"],
    ["<calc> 2 </calc>", "<calc> 3 </calc>", "<calc> 4 </calc>"],
    ["<calc> 5 </calc>", "<calc> 3 </calc>", "<calc> so </calc>"]]
# The whole of each behind its prompt; observations in brackets.
WHOLE = [
    "so <calc> 2 * 3 </calc> [= 6] so 6 </s>",
    "<calc> ( 1 + 3 ) / 2 </calc> [= 2] is <calc> 2 + 2 </calc> [= 4] then 4 "
    "</s>",
    "well </s>",
    "<calc> so </calc> [= error] no </s>",
    "<calc> 2 </calc> [= 2] <calc> 3 </calc> [= 3] <calc> 4 </calc>",
    "<calc> 5 </calc> [= 5] <calc> 3 </calc> [= 3] <calc> so </calc>"]
REASONS = ["completed"] * 4 + ["max_turns", "parse_error"]
ANSWERS = ["so 6", "then 4", "well", "no", "<calc> 4 </calc>",
           "<calc> so </calc>"]
PROMPT = "go and"


def script_of(tokenizer, text):
  return np.array([
      token for part in text.split("</s>")
      for token in (tokenizer.encode(part) if part else [tokenizer.eos_id])
  ], np.int32)


def run_scripted(engine, writes, pool, *, renderer=scene.RENDERER, **options):
  """Runs a calculator on each problem, whose turns write what is given."""
  asked = [0] * len(writes)
  made = []

  def make_request(task, sample_id):
    turn = asked[task.prompt_id]
    asked[task.prompt_id] += 1
    text = writes[task.prompt_id][turn]
    made.append(dataclasses.replace(
        scene.REQUEST, max_tokens=40,
        script=script_of(renderer.tokenizer, text)))
    return made[-1]

  tasks = [task for i in range(len(writes)) for task in make_tasks(
      {"id": i, "prompt": PROMPT}, renderer, sample_ids=[0], max_tokens=100,
      seed=3, stage="test")]
  driver = Driver(engine, make_request, Calls(pool))
  return driver.run(tasks, functools.partial(calculator, **options))


def row_of(trajectory):
  """Tokens behind the prompt and a mask of those that were sampled."""
  tokens, mask = [], []
  for turn in trajectory.chain():
    if turn.parent is not None:
      tokens += turn.observation
      mask += [False] * len(turn.observation)
    tokens += turn.completion.tokens
    mask += [True] * len(turn.completion.tokens)
  return tokens, mask


def rendered(text):
  """The same of a conversation as text."""
  tokens, mask, inside = [], [], False
  for word in text.split():
    inside |= word.startswith("[")
    tokens += [1] if word == "</s>" else scene.TOKENIZER.encode(
        word.strip("[]"))
    mask.append(not inside)
    inside &= not word.endswith("]")
  return tokens, mask


def test_a_calculator_is_its_conversation():
  engine = scene.make_engine(prefix_cache_tokens=4000)
  with WorkerPool(Settings()) as pool:
    found = run_scripted(
        engine, WRITES, pool, max_turns=3, answered="= {value}",
        malformed="= error")
  prompt = tuple(scene.TOKENIZER.encode(PROMPT))
  for each, whole, reason, answer in zip(
      found, WHOLE, REASONS, ANSWERS, strict=True):
    assert (each.outcome.reason, each.answer) == (reason, answer)
    tokens, mask = row_of(each)
    assert (tokens, mask) == rendered(whole)
    # Every turn was drawn behind exactly this sequence, too.
    done = each.turns[-1].completion
    assert (*done.request.prompt, *done.tokens) == (*prompt, *tokens)
    assert all((turn.completion.provenance == 1).all() for turn in each.turns)
  # As rows for training: sampled tokens alone are in a loss.
  rows = rollouts.of_trajectories(found)
  assert [(rows.completion(i), rows.loss_mask[i, :rows.lengths[i]].tolist())
          for i in range(len(found))] == [*map(rendered, WHOLE)]
  assert (rows.logprobs[~rows.loss_mask] == 0).all()
  assert found[5].outcome.reason_text == "it may have numbers, + - * / and " + (
      "parentheses")
  # Each token is computed once: but the last of a sequence, which is never fed,
  # and a prompt that all share is prefilled for the first of them.
  lengths = [len(row_of(each)[0]) for each in found]
  turns = sum(len(each.turns) for each in found)
  fed = engine.stats.row_steps - engine.stats.surplus - turns
  observed = sum(mask.count(False) for _, mask in map(row_of, found))
  assert engine.stats.prefilled_tokens + fed == (
      len(prompt) + sum(lengths) - len(found))
  # A prefill computes the prompt, the observations, and before each of these
  # the token that was not fed.
  assert engine.stats.prefilled_tokens == (
      len(prompt) + observed + turns - len(found))
  # The logprobs of the turns are those of the rows, prefilled whole.
  plain = engine_scene.take(scene.make_engine(), [dataclasses.replace(
      scene.REQUEST, prompt=(*prompt, *turn), max_tokens=len(rest),
      script=np.array(rest)) for turn, rest in (
          (row_of(each)[0][:-len(each.turns[-1].completion.tokens)],
           each.turns[-1].completion.tokens) for each in found)])
  for each, done in zip(found, plain, strict=True):
    np.testing.assert_allclose(
        each.turns[-1].completion.logprobs, done.logprobs, rtol=0, atol=5e-5)


def test_by_default_the_second_turn_is_the_last():
  assert is_multi_turn(calculator)
  found = run_scripted(scene.make_engine(), WRITES[1:2], scene.Pool())
  assert found[0].outcome.reason == "max_turns" and len(found[0].turns) == 2
  [turn] = run_scripted(scene.make_engine(), WRITES[2:3], scene.Pool())
  assert turn.outcome.reason == "completed" and not turn.calls


def test_no_turn_is_an_error():
  [found] = run_scripted(
      scene.make_engine(), WRITES[2:3], scene.Pool(), max_turns=0)
  assert found.outcome.reason == "error"
  assert "max_turns is 0" in found.outcome.reason_text


class Failing(scene.Pool):
  """Ends each call with a status."""

  def __init__(self, status):
    super().__init__()
    self._status = status

  def _make(self, call):
    return scene.Result(self._status, reason="the reason")


@pytest.mark.parametrize("status, reason", [
    ("timeout", "timeout"), ("error", "tool_error")])
def test_a_call_that_fails_ends_the_episode(status, reason):
  [found] = run_scripted(scene.make_engine(), WRITES[:1], Failing(status))
  assert found.outcome.reason == reason
  assert found.outcome.reason_text == "the reason"


# A byte-level BPE that merges ">" with the line break behind it, as Qwen's.
MERGING = build.merging()


def test_a_stop_string_inside_a_token_stays():
  """What follows the string in its last token is a part of the turn."""
  table = symbols.SymbolTable.of(MERGING)
  config = models.make_config(vocab_size=MERGING.vocab_size)
  engine = engine_scene.Engine(
      models.load(config, models.random_params(config)),
      Strings(stop_ids=MERGING.stop_ids,
              vocab_size=MERGING.vocab_size).tables(),
      dataclasses.replace(
          engine_scene.SETTINGS, prefill_rows=1, min_seq_len=160,
          prefill_chunk=32, prefix_cache_tokens=4000), symbols=table)
  writes = ["so <calc>12*7</calc>\n and", " it is 84</s>"]
  ids = MERGING.encode("so <calc>12*7</calc>\n")
  assert MERGING.decode(ids[-1:]) == ">\n"
  [found] = run_scripted(
      engine, [writes], scene.Pool(), renderer=render.PlainRenderer(MERGING))
  assert found.outcome.reason == "completed" and found.calls[0].value == (
      "84", "")
  tokens, mask = row_of(found)
  said = MERGING.encode(" = 84", after=ids[-1])
  rest = MERGING.encode(" it is 84", after=said[-1])
  assert tokens == [*ids, *said, *rest, MERGING.eos_id]
  assert mask == [True] * len(ids) + [False] * len(said) + [True] * (
      len(rest) + 1)
  assert MERGING.decode(tokens[:-1]) == "so <calc>12*7</calc>\n = 84 it is 84"
