"""Oracles: the published traces, and a plain-Python account of the rules."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.sampler import budget, budget_state, budget_tables
from tests import meshes
from tests.sampler import forcing
from tests.sampler.forcing import Limits, Strings

TRACES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data/oracles.json").read_text()
)["budget_forcing_traces"]["cases"]
FINISH = {budget_state.EOS: "eos", budget_state.BUDGET: "budget",
          budget_state.LENGTH: "length"}
CLOSED = {budget_state.OPEN: "open", budget_state.NATURAL: "natural",
          budget_state.CLOSED: "budget"}
SOURCES = {budget_state.SAMPLED: "sampled", budget_state.FORCED: "forced"}


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    yield


def budgets_of(limits):
  column = lambda name, dtype=np.int32: sharding.put(
      np.array([getattr(row, name) for row in limits], dtype), "batch")
  return budget.Budgets(
      max_thinking_tokens=column("maximum"),
      min_thinking_tokens=column("minimum"), num_waits=column("waits"),
      max_tokens=column("tokens"), truncate=column("truncate", bool),
      wait_order=sharding.put(np.array(
          [(*row.order, -1, -1)[:2] for row in limits], np.int32),
          "batch", None),
      suppress=column("suppress", bool), max_thinking_steps=column("steps"))


start_rows = jax.jit(budget.init)
plan_rows = jax.jit(budget.plan)
advance_rows = jax.jit(budget.advance)


def drive(model, prompts, in_thinking, strings, limits, answer=True):
  """The machine under a scripted model, the record kept as documented.

  With `answer` false, stops where the answer phase would begin to sample.
  """
  tables, budgets = strings.tables(), budgets_of(limits)
  put = lambda x, dtype=np.int32: sharding.put(np.array(x, dtype), "batch")
  rows = range(len(prompts))
  state = start_rows(
      tables, budgets, put(in_thinking, bool), put([p[-1] for p in prompts]),
      put([False for _ in rows], bool))
  records = [forcing.Row([], []) for _ in rows]
  for _ in range(2000):
    forced, banned = sharding.fetch(plan_rows(tables, budgets, state))
    before = sharding.fetch(state)
    over = before.done | (not answer) & (
        (before.phase == budget_state.ANSWER) & (forced < 0))
    if over.all():
      break
    token = [0 if over[i] else forced[i] if forced[i] >= 0 else next(
        t for t in model(i, list(prompts[i]) + records[i].tokens)
        if banned is None or not banned[i, t]) for i in rows]
    state, emit = advance_rows(
        tables, budgets, state, put(token), put(forced >= 0, bool))
    record(records, prompts, before, sharding.fetch((state, emit)), over)
  for i, row in enumerate(records):
    row.finish = FINISH.get(int(before.finish_reason[i]), "")
    row.closed = CLOSED[int(before.think_end[i])]
    row.thinking = int(before.thinking[i])
    row.answer = int(before.answer[i])
    row.steps = int(before.steps[i])
    row.waits = int(before.wait_count[i])
  return records


def record(records, prompts, before, after, over):
  state, emit = after
  for i, row in enumerate(records):
    if before.done[i]:
      assert emit.provenance[i] == budget_state.NONE and not emit.refeed[i]
    if over[i]:
      continue
    if emit.dropped[i]:
      del row.tokens[-emit.dropped[i]:], row.sources[-emit.dropped[i]:]
    assert emit.keep[i] != emit.refeed[i]
    if emit.keep[i]:
      row.tokens.append(int(emit.token[i]))
      row.sources.append(SOURCES[int(emit.provenance[i])])
    assert state.draws[i] == before.draws[i] + 1
    assert state.num_tokens[i] == len(row.tokens)
    assert state.last[i] == (list(prompts[i]) + row.tokens)[-1]


class Words:
  """Ids of the words of the published traces."""

  WORDS = ("\n", "<S>", "<E>", "think", "answer", "Final", " Answer", ":",
           "Wait", "P", ",", "a", "b", "c", "d", "e")

  def __call__(self, words):
    return tuple(self.WORDS.index(w) for w in words)

  def text(self, ids):
    return [self.WORDS[i] for i in ids]


ids = Words()


def s1_strings(wait):
  return Strings(
      start=ids(["<S>", "think"]), end=ids(["<S>", "answer"]),
      delimiters=(ids(["<S>"]), ids(["<E>"])), newline=ids(["\n"]),
      final_answer=ids(["\n", "Final", " Answer", ":"]), wait=ids(wait),
      stop_ids=ids(["<E>"]), ends_newline=frozenset(ids(["\n"])),
      vocab_size=len(ids.WORDS))


def scripted(script):
  """Each call offers what is left of the script, in order.

  A token that is banned is passed over, as under a model that would have
  written the next one.
  """
  rest = list(ids([word for scene in script for word in scene]))

  def model(_):
    while rest:
      yield rest.pop(0)
  return model


def play(case, run):
  limits = Limits(
      maximum=case["max"], minimum=case.get("min", 0),
      waits=case.get("waits", 0))
  prompt = ids(["P", "<S>", "think"])
  row = run(scripted(case["script"]), prompt, s1_strings(case.get("wait", [])),
            limits)
  return ["P", "<S>", "think", *ids.text(row.tokens)], row


def machine(model, prompt, strings, limits):
  return drive(lambda _, context: model(context), [prompt], [True], strings,
               [limits], answer=False)[0]


QUIRKS = [
    # Q1: the maximum holds over all rounds; s1 grants it to each anew.
    dict(name="waits do not extend the maximum", max=4, waits=2,
         wait=["Wait"],
         script=[["\n", "a", "<S>"], ["b", "c", "d", "e"]],
         out=["P", "<S>", "think", "\n", "a", "Wait", "b", "\n", "<S>",
              "answer", "\n", "Final", " Answer", ":"]),
    # Q2: what was cut is treated as cut; s1 closes it as if it had ended.
    dict(name="a cut round gets the final answer", max=6, waits=1,
         wait=["Wait"],
         script=[["\n", "a", "b", "\n", "<S>"], [",", "c", "d", "\n", "<S>"]],
         out=["P", "<S>", "think", "\n", "a", "b", "\n", "Wait", ",", "\n",
              "<S>", "answer", "\n", "Final", " Answer", ":"]),
    dict(name="the maximum falls inside the wait text", max=4, waits=1,
         wait=["Wait", ",", "b"], script=[["\n", "a", "<S>"]],
         out=["P", "<S>", "think", "\n", "a", "Wait", ",", "\n", "<S>",
              "answer", "\n", "Final", " Answer", ":"]),
    dict(name="a maximum of zero closes at once", max=0, script=[["a"]],
         out=["P", "<S>", "think", "\n", "<S>", "answer", "\n", "Final",
              " Answer", ":"]),
    dict(name="a stop id that is no way out is not written after a wait",
         max=9, waits=1, wait=["Wait"],
         script=[["a", "<S>"], ["<E>", "<S>", "b", "<S>"]],
         out=["P", "<S>", "think", "a", "Wait", "b", "<S>", "answer"]),
    dict(name="another delimiter is replaced by the end", max=9,
         script=[["a", "<E>"]],
         out=["P", "<S>", "think", "a", "<S>", "answer"]),
]


@pytest.mark.parametrize("case", TRACES + QUIRKS, ids=lambda case: case["name"])
def test_traces(case):
  """s1's control flow, and our side where its code has quirks."""
  text, _ = play(case, machine)
  assert text == case["out"]


def test_the_delimiter_that_was_sampled_stays_sampled():
  _, row = play(TRACES[0], machine)
  assert row.sources == ["sampled"] * 5 + ["forced"]
  assert (row.thinking, row.closed) == (4, "natural")


def test_closing_tokens_do_not_count():
  _, row = play(TRACES[1], machine)
  assert row.sources == ["sampled"] * 4 + ["forced"] * 7
  assert (row.thinking, row.closed) == (4, "budget")


def random_strings(seed):
  """Strings over few tokens, so that they overlap in every way."""
  rng = np.random.default_rng(seed)
  while True:
    word = lambda least, most: tuple(
        int(t) for t in rng.integers(0, 7, rng.integers(least, most + 1)))
    strings = Strings(
        start=word(1, 2), end=word(1, 3),
        delimiters=tuple(word(1, 3) for _ in range(rng.integers(0, 3))),
        newline=word(0, 1), final_answer=word(0, 2), wait=word(0, 3),
        more_waits=tuple(word(0, 2) for _ in range(rng.integers(0, 3))),
        reflections=word(0, 2), step=word(0, 2),
        stop_ids=word(1, 1), ends_newline=frozenset(word(1, 2)))
    try:
      strings.tables()
      return strings
    except ValueError:  # A stop id inside a delimiter; see the test below.
      continue


STRINGS = [
    Strings(start=(5,), end=(6,), newline=(1,), wait=(4,), stop_ids=(7,),
            ends_newline=frozenset([1])),
    Strings(start=(5, 0), end=(6, 0), delimiters=((6,), (7,)), newline=(1,),
            final_answer=(1, 2), wait=(4, 3), stop_ids=(7,),
            ends_newline=frozenset([1])),
    Strings(start=(2,), end=(3, 4, 5), newline=(1,), final_answer=(2,),
            stop_ids=(7, 0), ends_newline=frozenset([1])),
    Strings(start=(2,), end=(3, 4), delimiters=((5, 4), (0, 5, 4)),
            wait=(3,), stop_ids=(7,)),
    Strings(stop_ids=(7,)),
    *(random_strings(seed) for seed in range(5)),
]
ROWS = 12


def markov(strings, seed):
  """A model that often goes on with a string that it has begun."""
  targets = [s for s in (
      strings.start, strings.end, *strings.delimiters, strings.stop_ids) if s]

  def model(row, context):
    rng = np.random.default_rng([seed, row, *context])
    ranked = rng.permutation(strings.vocab_size).tolist()
    target = targets[rng.integers(len(targets))]
    if rng.random() < 0.5:
      begun = max(n for n in range(len(target))
                  if n == 0 or tuple(context[-n:]) == target[:n])
      ranked.remove(target[begun])
      ranked.insert(0, target[begun])
    return ranked
  return model


rows_of_limits = st.lists(
    st.builds(
        Limits, maximum=st.integers(-1, 9), minimum=st.integers(0, 5),
        waits=st.integers(0, 3), tokens=st.integers(1, 30),
        truncate=st.booleans(), suppress=st.booleans(),
        order=st.sampled_from([(), (0,), (0, 0)]),
        steps=st.integers(-1, 2)),
    min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("index", range(len(STRINGS)))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(limits=rows_of_limits, seed=st.integers(0, 10**6))
def test_the_machine_follows_the_rules(index, limits, seed):
  strings = STRINGS[index]
  rng = np.random.default_rng(seed)
  prompts = rng.integers(0, 8, (ROWS, 3)).tolist()
  in_thinking = (rng.random(ROWS) < 0.7).tolist()
  model = markov(strings, seed)
  rows = drive(model, prompts, in_thinking, strings, limits)
  for i, row in enumerate(rows):
    assert row == forcing.reference(
        functools.partial(model, i), prompts[i], in_thinking[i], strings,
        limits[i])
    assert limits[i].maximum < 0 or row.thinking <= limits[i].maximum
    assert limits[i].steps < 0 or row.steps <= limits[i].steps or (
        not strings.step)
    assert len(row.tokens) <= limits[i].tokens
    if row.closed == "natural":
      assert row.thinking >= limits[i].minimum


@functools.partial(jax.jit, static_argnames="steps")
def loop(tables, budgets, in_thinking, last, table, steps):
  """The decode loop, with a table in place of the model."""
  like = jnp.broadcast_to(last[:, None], (last.shape[0], steps)) * 0

  def body(carry):
    step, state, tokens, sources, dropped = carry
    forced, banned = budget.plan(tables, budgets, state)
    logits = table.at[state.last].get(out_sharding=sharding.spec("batch", None))
    logits = jnp.where(banned, -1e30, logits)
    token = jnp.where(forced >= 0, forced, jnp.argmax(logits, axis=-1))
    state, emit = budget.advance(tables, budgets, state, token, forced >= 0)
    write = lambda to, column: jnp.where(
        jnp.arange(steps) == step, column[:, None], to)
    return (step + 1, state, write(tokens, emit.token),
            write(sources, emit.provenance), write(dropped, emit.dropped))

  state = budget.init(tables, budgets, in_thinking, last, last < 0)
  return jax.lax.while_loop(
      lambda carry: (carry[0] < steps) & ~jnp.all(carry[1].done), body,
      (0, state, like, like, like))


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_the_loop_is_one_program_on_any_mesh(shape):
  strings = STRINGS[3]
  table = np.random.default_rng(5).normal(size=(8, 8)).astype(np.float32)
  limits = [Limits(maximum=m, waits=w, tokens=20, minimum=w)
            for m in (-1, 0, 3, 8) for w in (0, 2)]
  # Ids 3 to 5 are what the delimiters are made of.
  table[:, 3:6] += 1.5
  with jax.set_mesh(meshes.mesh(*shape)):
    put = lambda x, dtype=np.int32: sharding.put(np.array(x, dtype), "batch")
    _, state, *steps = loop(
        strings.tables(), budgets_of(limits), put([True] * 8, bool),
        put(range(8)), sharding.put(table, None, None), steps=60)
    layouts = {str(jax.typeof(x)) for x in jax.tree.leaves(state)}
    tokens, sources, dropped = sharding.fetch(steps)
    thinking = sharding.fetch(state.thinking)
  assert all("8@fsdp" in layout for layout in layouts)
  ranking = lambda context: np.argsort(-table[context[-1]], kind="stable")
  for i in range(8):
    row = []
    for token, source, back in zip(
        tokens[i], sources[i], dropped[i], strict=True):
      row = row[:len(row) - back] + ([int(token)] if source else [])
    want = forcing.reference(ranking, [i], True, strings, limits[i])
    assert row == want.tokens
    assert thinking[i] == want.thinking


def test_other_budgets_and_strings_compile_nothing():
  """Both are data; the strings as long as their tables have the same shapes."""
  def run(strings, maximum):
    drive(markov(strings, 0), [[0]] * ROWS, [True] * ROWS, strings,
          [Limits(maximum=maximum, tokens=9)] * ROWS)

  sizes = lambda: [
      f._cache_size() for f in (start_rows, plan_rows, advance_rows)]
  run(STRINGS[0], 3)
  compiled = sizes()
  run(STRINGS[0], 5)
  run(dataclasses.replace(
      STRINGS[0], start=(2,), end=(3,), wait=(0,), newline=(4,)), 3)
  assert sizes() == compiled


def test_unused_thinking_bans_and_forces_nothing():
  tables = STRINGS[4].tables()
  budgets = budgets_of([Limits(tokens=5)])
  zeros = sharding.put(np.zeros(1, np.int32), "batch")
  state = budget.init(tables, budgets, zeros == 0, zeros, zeros > 0)
  forced, banned = budget.plan(tables, budgets, state)
  assert banned is None and forced[0] == -1


def test_rows_end_from_outside():
  tables = STRINGS[0].tables()
  budgets = budgets_of([Limits(), Limits()])
  zeros = sharding.put(np.zeros(2, np.int32), "batch")
  state = budget.init(tables, budgets, zeros == 0, zeros, zeros > 0)
  rows = sharding.put(np.array([False, True]), "batch")
  state = sharding.fetch(budget.end(state, rows, budget_state.STOP))
  assert list(state.finish_reason) == [budget_state.RUNNING, budget_state.STOP]
  assert list(state.done) == [False, True]


@pytest.mark.parametrize("wrong,message", [
    (dict(end=(9,)), "thinking.end .* vocabulary ends at 7"),
    (dict(end=(7, 1), stop_ids=(7,)), "thinking.delimiters"),
])
def test_strings_that_cannot_work_are_errors(wrong, message):
  with pytest.raises(ValueError, match=message):
    Strings(**wrong).tables()


def test_newline_flags_have_the_vocabulary():
  with pytest.raises(ValueError, match="newline_ends"):
    budget.BudgetTables.build(
        budget_tables.ThinkingIds(end=(1,), tokens=[(256,)] * 8), len, (),
        np.zeros(3, bool))
