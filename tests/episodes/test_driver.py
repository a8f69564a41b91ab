"""Oracles: requests run alone; ids by the documented rule; scripted calls."""

import dataclasses
import struct
import sys
import zlib

import numpy as np
import pytest

from posttrain.episodes import protocol
from posttrain.episodes.call import Call, Gather
from posttrain.episodes.calls import Calls
from posttrain.episodes.protocol import Generate, Outcome
from posttrain.episodes.single_turn import single_turn
from tests.episodes import scene
from tests.sampler import engine_scene

pytestmark = pytest.mark.usefixtures("one_device")
CACHE = dict(prefix_cache_tokens=4000)
PROMPTS = ["so is", "yes go", "1 + 2 ="]


def run(episode, *, pool=None, engine=None, prompts=PROMPTS, samples=1,
        max_tokens=100, score=lambda trajectory: (), **changes):
  driver = scene.make_driver(
      engine or scene.make_engine(), pool or scene.Pool(), **changes)
  return driver.run(
      scene.make_tasks(prompts, samples=samples, max_tokens=max_tokens),
      episode, score=score)


def tokens(trajectories):
  return [[turn.completion.tokens for turn in each.turns]
          for each in trajectories]


def fork_id(own, code, branch):
  crc = zlib.crc32(struct.pack("<qqi", own, code, branch))
  return int(np.uint32(crc).astype(np.int32))


def test_a_single_turn_is_a_request_to_the_engine():
  found = run(single_turn, samples=4)
  asked = [dataclasses.replace(
      scene.REQUEST, prompt=tuple(scene.TOKENIZER.encode(prompt)), prompt_id=i,
      sample_id=j) for i, prompt in enumerate(PROMPTS) for j in range(4)]
  wanted = engine_scene.take(scene.make_engine(), asked)
  for each, done in zip(found, wanted, strict=True):
    [turn] = each.turns
    np.testing.assert_array_equal(turn.completion.logprobs, done.logprobs)
    assert turn.completion.tokens == done.tokens
    assert turn.completion.request == done.request
    assert turn.observation == done.request.prompt and turn.parent is None
    assert each.answer == turn.answer == turn.text
    assert each.outcome == Outcome() and not each.calls and not each.scores
  assert [(each.prompt_id, each.sample_id) for each in found] == [
      (i, j) for i in range(3) for j in range(4)]


def tree(task):
  """Branches, a turn behind one of them, and a second fresh request."""
  one, two = yield Generate(task.prompt, n=2)
  [a, b], c = yield [
      Generate(task.encode("so", two), parent=two, n=2),
      Generate((), parent=two)]
  d, e = yield Generate(task.encode("go", c), parent=c), Generate(task.prompt)
  # A second one behind the same turn, and the same tokens: other draws.
  f = yield Generate(task.encode("go", c), parent=c)
  g = yield Generate(task.prompt, n=2)
  return Outcome(answer=str(len([one, a, b, d, e, f, *g])))


def test_draws_of_a_tree_are_the_documented_ones():
  """And the same without a prefix cache."""
  kept = scene.make_engine(**CACHE)
  found = run(tree, engine=kept, samples=2)
  plain = run(tree, samples=2)
  assert kept.stats.reused_tokens > 0
  assert not kept._kept._sequences  # Turns are asked for by their tokens.
  for each, again in zip(found, plain, strict=True):
    assert each.outcome.reason == "completed", each.outcome
    turns = each.turns
    own = each.sample_id
    two = turns[1].completion
    other = fork_id(own, -1, 1)
    ids = [own, other, *(fork_id(other, two.draws, i) for i in (0, 1))]
    ids.append(fork_id(other, two.draws, 2))  # Two branches came before it.
    # The first that goes on from a turn is the same row of draws.
    c = turns[4].completion
    ids += [ids[4], fork_id(own, -2, 0), fork_id(ids[4], c.draws, 1)]
    ids += [fork_id(own, -3, 0), fork_id(own, -3, 1)]
    requests = [turn.completion.request for turn in turns]
    assert [request.sample_id for request in requests] == ids
    assert [request.first_draw for request in requests] == [
        0, 0, two.draws, two.draws, two.draws, c.draws, 0, c.draws, 0, 0]
    assert [turn.parent for turn in turns] == [
        None, None, 1, 1, 1, 4, None, 4, None, None]
    assert len({tuple(turn.completion.tokens) for turn in turns}) == 10
    for turn, other in zip(turns, again.turns, strict=True):
      parent = () if turn.parent is None else turns[turn.parent].completion.kept
      assert turn.completion.request.prompt == (*parent, *turn.observation)
      assert turn.completion.request.keep
      assert not other.completion.request.keep
      assert turn.completion.tokens == other.completion.tokens
      np.testing.assert_allclose(
          turn.completion.logprobs, other.completion.logprobs, atol=5e-5)
  # Each as its request alone, which is data.
  asked = [engine_scene.alone(turn.completion)
           for each in found for turn in each.turns]
  wanted = engine_scene.take(scene.make_engine(), asked)
  assert sum(
      engine_scene.flips(turn.completion, done, scene.STRINGS)
      for turn, done in zip(
          (turn for each in found for turn in each.turns), wanted,
          strict=True)) <= 1


def test_thinking_goes_on_behind_a_turn_or_does_not():
  """In the engine's scene token 3 opens a section, and 4 and 5 end it."""
  engine = engine_scene.make_engine(symbols=scene.TABLE, min_seq_len=128)
  scripts = iter([[13, 14], [15, 4, 5, 17], [16], [16, 4, 5, 18]])

  def think(task):
    one = yield Generate((12, 3), changes={"max_tokens": 2})
    yield Generate((), parent=one)
    yield Generate((12,), parent=one)
    yield Generate((12,), parent=one, changes={
        "in_thinking": one.completion.kept_in_thinking})
    return Outcome()

  driver = scene.make_driver(engine)
  driver._make_request = lambda task, sample_id: dataclasses.replace(
      scene.REQUEST, max_tokens=4, script=np.array(next(scripts)))
  [found] = driver.run(scene.make_tasks(["so"]), think)
  one, two, three, four = (turn.completion for turn in found.turns)
  assert one.kept == (12, 3, 13, 14) and one.kept_in_thinking
  assert [done.request.in_thinking for done in (two, three, four)] == [
      True, False, True]
  assert two.tokens == [15, 4, 5, 17] and two.think_length == 1
  assert not three.think_length and four.think_length == 1
  decode = scene.TOKENIZER.decode
  assert [(turn.thinking.strip(), turn.answer.strip())
          for turn in (found.turns[0], found.turns[1], found.turns[3])] == [
              (decode([13, 14]), ""), (decode([15]), decode([17])),
              (decode([16]), decode([18]))]


def test_an_episodes_own_randomness_is_seeded_by_its_ids():
  tasks = scene.make_tasks(PROMPTS, samples=3)
  draws = [task.generator.random() for task in tasks]
  assert len(set(draws)) == 9
  [moved] = protocol.make_tasks(
      dict(tasks[3].row), scene.RENDERER, sample_ids=[0], max_tokens=1, seed=3,
      stage="test", step=4)
  assert moved.generator.random() == draws[3]


def ask(task, seconds=None):
  turn = yield Generate(task.prompt)
  result = yield Call("builtins:len", (turn.text,), seconds=seconds)
  yield Generate(task.encode("so", turn), parent=turn)
  return Outcome(answer=str(result.value))


def test_no_episode_waits_for_another():
  """A call is held back until all the others have been made and scored."""
  pool = scene.Pool()
  last = len(PROMPTS) * 3 - 1
  pool.delay = lambda number: 0 if number else 10**9
  submit = pool.submit

  def release(call):
    if len(pool.made) == 2 * last:  # Calls and scores of all but the first.
      pool.hurry(0)
    return submit(call)

  pool.submit = release
  found = run(ask, pool=pool, samples=3, score=lambda trajectory: [
      ("length", Call("builtins:len", (trajectory.answer,)))])
  assert len(pool.made) == 2 * (last + 1)
  for each in found:
    text = each.turns[0].text
    assert each.answer == str(len(text)) and each.calls[0].value == len(text)
    assert each.scores["length"].value == len(str(len(text)))


def test_the_moment_at_which_calls_end_changes_no_token():
  rng = np.random.default_rng(0)
  runs = [run(ask, pool=scene.Pool(delay), samples=2) for delay in (
      lambda number: 0, lambda number: int(rng.integers(9)),
      lambda number: number)]
  assert tokens(runs[0]) == tokens(runs[1]) == tokens(runs[2])


def test_hosts_replay_one_list_of_events():
  """The second host has no workers; its list is the first host's."""
  rng = np.random.default_rng(1)
  lists, engines = [], [scene.make_engine(), scene.make_engine()]
  submitted = [[], []]

  def told(ask_pool):
    lists.append(ask_pool())
    return lists[-1]

  def replayed(ask_pool):
    return lists.pop(0)

  found = []
  for host, (pool, share) in enumerate((
      (scene.Pool(lambda number: int(rng.integers(6))), told),
      (None, replayed))):
    engine, record = engines[host], submitted[host]
    submit = engine.submit
    engine.submit = lambda request, submit=submit, record=record: (
        record.append(request) or submit(request))
    driver = scene.make_driver(engine)
    driver._calls = Calls(pool, share=share)
    found.append(driver.run(
        scene.make_tasks(PROMPTS, samples=3), ask, score=lambda trajectory: [
            ("max", Call("tests.episodes.scene:lengths", (trajectory.answer,),
                         gather=Gather(trajectory.prompt_id, 3)))]))
  assert not lists and submitted[0] == submitted[1]
  for one, two in zip(*found, strict=True):
    assert one.calls == two.calls and one.scores == two.scores
    assert one.scores["max"].status == "ok"
    for a, b in zip(one.turns, two.turns, strict=True):
      np.testing.assert_array_equal(
          a.completion.logprobs, b.completion.logprobs)


def test_scores_are_made_while_others_decode():
  engine = scene.make_engine(max_num_seqs=4)
  pool = scene.Pool()
  busy, submit = [], pool.submit
  pool.submit = lambda call: busy.append(engine.busy) or submit(call)
  run(single_turn, engine=engine, pool=pool, samples=4,
      score=lambda trajectory: [("n", Call("builtins:len", ("x",)))])
  assert len(busy) == 12 and sum(busy) >= 4 and not busy[-1]
  # While something decodes, nothing waits for a call.
  assert 0.0 in pool.waits and pool.waits.count(0.0) >= 2


# Errors.


def raises(task):
  turn = yield Generate(task.prompt)
  raise KeyError(turn.text)


def leaves(task):
  yield Generate(task.prompt)
  sys.exit(0)


def returns_nothing(task):
  yield Generate(task.prompt)


def yields_text(task):
  yield "so"


def yields_a_list_of_text(task):
  yield [Generate(task.prompt), "so"]


def no_samples(task):
  yield Generate(task.prompt, n=0)


def chooses_ids(task):
  yield Generate(task.prompt, changes={"sample_id": 3})


def changes_nothing_known(task):
  yield Generate(task.prompt, changes={"temperatur": 3})


def unknown_tokens(task):
  yield Generate((999,))


def no_tokens(task):
  yield Generate("so")


def another_parent(task):
  turn = yield Generate(task.prompt)
  yield Generate((), parent=dataclasses.replace(turn))


def odd_reason(task):
  yield Generate(task.prompt)
  return Outcome(reason="tired")


def never_ends(task):
  try:
    yield Generate(task.prompt)
    yield 3
  finally:
    raise OSError("while it is closed")


def is_no_generator(task):
  return Outcome()


def needs_more(task, samples):
  yield Generate(task.prompt, n=samples)


def is_interrupted(task):
  yield Generate(task.prompt)
  raise GeneratorExit("by itself")


class Untellable(Exception):
  def __str__(self):
    raise ValueError


def cannot_be_told(task):
  yield Generate(task.prompt)
  raise Untellable


def answers_a_number(task):
  yield Generate(task.prompt)
  return Outcome(answer=7)


def rewards_infinity(task):
  yield Generate(task.prompt)
  return Outcome(rewards={0: float("inf")})


def ends(**fields):
  def end(task):
    yield Generate(task.prompt)
    return Outcome(**fields)
  return end


def calls_for_ever(task):
  while True:
    yield Call("builtins:len", ("so",))


def wants_nothing_for_ever(task):
  while True:
    yield []


def changing(**changes):
  def change(task):
    # Beside others, which are answered.
    yield [Generate(task.prompt), Call("builtins:len", ("so",)),
           Generate(task.prompt, changes=changes), Generate(task.prompt)]
  return change


def calling(*args, **kwargs):
  def call(task):
    yield Call(*args, **kwargs)
  return call


@pytest.mark.parametrize("episode, reason", [
    (raises, "KeyError"), (leaves, "SystemExit"),
    (returns_nothing, "returned a NoneType"), (yields_text, "yielded a str"),
    (yields_a_list_of_text, "a sequence with a str"),
    (no_samples, "n is 0"), (chooses_ids, "sample_id, which an episode cannot"),
    (changes_nothing_known, "temperatur"),
    (unknown_tokens, "token id lies outside"), (no_tokens, "as an integer"),
    (another_parent, "no turn of this episode"), (odd_reason, "'tired'"),
    (never_ends, "yielded a int"), (is_no_generator, "must be a generator"),
    (needs_more, "samples"), (is_interrupted, "GeneratorExit: by itself"),
    (cannot_be_told, "Untellable: it cannot"),
    (answers_a_number, "answer is a int"), (rewards_infinity, "0: inf"),
    (ends(rewards={1: 1.0}), "rewards has turn 1"),
    (ends(rewards={True: 1.0}), "by the numbers of turns"),
    (ends(reason_text=b"tired"), "reason_text is a bytes"),
    (calls_for_ever, "asked for 10001 turns and calls"),
    (wants_nothing_for_ever, "asked for 10001"),
    (lambda task: (yield Generate(task.prompt, n=10**9)), "1000000000 turns"),
    (changing(in_thinking="yes"), "in_thinking='yes'"),
    (changing(max_tokens="7"), "max_tokens='7', a str"),
    (changing(max_tokens=7.5), "a float, and it must be a int"),
    (changing(truncate=1), "a int, and it must be a bool"),
    (changing(stop_strings="ab"), "a str, and it must be a tuple"),
    (changing(stop_strings=(7,)), "TypeError"),
    (changing(stop_strings=("",)), "stop string is empty"),
    (changing(stop_ids=("a",)), "TypeError"),
    (changing(banned_ids=(1, 2, 3, 4, 5)), "Raise its max_ids"),
    (changing(script=np.zeros((2, 2), np.int32)), "script has shape"),
    (changing(max_thinking_tokens=7), "max_thinking_tokens"),
    (calling(7), "function is a int"), (calling("a:b", [7]), "args is a list"),
    (calling("a:b", kwargs=None), "kwargs is a NoneType"),
    (calling("a:b", seconds="7"), "seconds is a str"),
    (calling("a:b", seconds=0), "seconds are 0"),
    (calling("a:b", seconds=float("nan")), "seconds are nan"),
    (calling("a:b", gather=7), "gather is a int"),
    (calling("a:b", gather=Gather("k", "2")), "Gather's size is '2'")])
def test_an_error_ends_its_episode_alone(episode, reason):
  def some(task):
    return (episode if task.prompt_id == 1 else single_turn)(task)

  engine = ENGINES.setdefault("plain", scene.make_engine())
  found = run(some, engine=engine)
  assert found[1].outcome.reason == "error"
  assert reason in found[1].outcome.reason_text
  others = [found[0], found[2]]
  assert [each.outcome for each in others] == [Outcome()] * 2
  wanted = ENGINES.setdefault("tokens", tokens(run(single_turn, engine=engine)))
  assert tokens(others) == [wanted[0], wanted[2]]


ENGINES: dict = {}


def test_an_episode_that_failed_is_scored_too():
  """Its group waits for it."""
  def some(task):
    return (raises if task.sample_id == 1 else single_turn)(task)

  found = run(some, samples=3, score=lambda trajectory: [
      ("n", Call("tests.episodes.scene:lengths", (trajectory.outcome.reason,),
                 gather=Gather(trajectory.prompt_id, 3)))])
  for i in range(0, 9, 3):
    assert [each.scores["n"].value for each in found[i:i + 3]] == [9, 5, 9]
