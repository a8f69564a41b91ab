"""Oracles: the same tokens as one prompt, prefilled whole; counts by hand."""

import dataclasses
import re
import zlib

import jax
import numpy as np
import pytest

from posttrain.sampler import rollouts, token_sampling, transcript
from posttrain.sampler.continuations import continuation, fork
from posttrain.sampler.engine import Engine
from posttrain.sampler.requests import Request
from posttrain.text import symbols
from tests import meshes
from tests.model import build
from tests.sampler import engine_scene as scene

PLAIN = Request(prompt=(12, 13, 14), max_tokens=12, seed=5, keep=True)
# One ring, which goes round, and few sizes of prompts: less to compile.
BUDGET = dict(prefix_cache_tokens=9000, min_seq_len=160, prefill_chunk=32)
# Texts of one and two letters: a stop string may begin within a token.
WORDS = ["?", "!", ".", *"abcdefghijklmn", "ab", "bc", "cd", "de", "ef", "fg",
         "gh", "hi", "ij", "jk", "kl", "lm", "mn", "na"]
LETTERS = {word: i for i, word in enumerate(WORDS) if len(word) == 1}
TABLE = symbols.SymbolTable(
    [tuple(word.encode()) for word in WORDS], lambda s: tuple(s.encode()),
    lambda s: tuple(LETTERS[chr(each)] for each in s))


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def text(tokens):
  return "".join(WORDS[token] for token in tokens)


def sequence(done):
  return (*done.request.prompt, *done.tokens)


def whole_prompts(strings=scene.STRINGS, **changes):
  """An engine that caches nothing, and prefills each prompt in one pass."""
  return scene.make_engine(strings, **(dict(
      min_seq_len=128, prefill_chunk=128, prefill_rows=1) | changes))


def gaps(found, wanted, same=True):
  """Differences of logprobs up to where the tokens part."""
  different = []
  for a, b in zip(found, wanted, strict=True):
    n = min(len(a.tokens), len(b.tokens))
    n = next((i for i in range(n) if a.tokens[i] != b.tokens[i]), n)
    different += np.abs(a.logprobs[:n] - b.logprobs[:n]).tolist()
    assert not same or a.tokens == b.tokens
  return np.array(different)


def test_a_conversation_of_ten_turns_computes_each_token_once():
  rng = np.random.default_rng(0)
  talk = scene.make_engine(
      scene.UNUSED, prefill_rows=1, max_seq_len=512, chunk=5,
      **(BUDGET | dict(min_seq_len=512)))
  [done] = scene.take(talk, [PLAIN])
  turns, steps = [done], len(done.tokens)
  for _ in range(9):
    said = rng.integers(12, scene.V, rng.integers(1, 30)).tolist()
    [done] = scene.take(talk, [continuation(
        turns[-1], said, max_tokens=int(rng.integers(1, 20)))])
    assert not done.error
    assert done.request.prompt == (*sequence(turns[-1]), *said)
    # Noise goes on where the last turn stopped: a step is a draw here.
    assert done.request.first_draw == steps
    steps += len(done.tokens)
    assert done.draws == steps
    turns.append(done)
  # Every turn's last token is fed by the next turn; the very last by none.
  fed = talk.stats.row_steps - len(turns)
  assert talk.stats.prefilled_tokens + fed == len(sequence(done)) - 1
  assert talk.stats.reused_tokens + talk.stats.prefilled_tokens == (
      talk.stats.prompt_tokens) == sum(len(t.request.prompt) for t in turns)
  wanted = scene.take(
      whole_prompts(scene.UNUSED, max_seq_len=512, min_seq_len=512),
      map(scene.alone, turns))
  assert sum(map(scene.flips, turns, wanted, [scene.UNUSED] * 10)) <= 1
  # As one long row would have drawn on, if nobody had said anything.
  [whole] = scene.take(whole_prompts(scene.UNUSED), [dataclasses.replace(
      PLAIN, max_tokens=40, keep=False)])
  begun = scene.make_engine(scene.UNUSED, **BUDGET)
  [one] = scene.take(begun, [dataclasses.replace(PLAIN, max_tokens=7)])
  [two] = scene.take(begun, [continuation(one, max_tokens=33)])
  assert one.tokens + two.tokens == whole.tokens


@pytest.mark.parametrize("budget", [9000, 200, 1])
def test_continuations_and_forks_are_full_prefills(budget):
  """Also where all or some of what was kept has been evicted."""
  rng = np.random.default_rng(1)
  busy = scene.make_engine(chunk=5, **(
      BUDGET | dict(prefix_cache_tokens=budget)))
  first = scene.take(busy, [dataclasses.replace(
      scene.random_request(rng, i, longest=30), keep=True) for i in range(12)])
  asked = []
  for i, done in enumerate(first):
    change = dict(max_tokens=30, max_thinking_tokens=-1, truncate=False)
    new = rng.integers(12, scene.V, rng.integers(0, 9)).tolist()
    asked += [continuation(done, new, **change),
              *(fork(done, branch, new, **change) for branch in range(i % 3))]
  found = scene.take(busy, asked)
  wanted = scene.take(whole_prompts(), map(scene.alone, found))
  assert not any(done.error for done in found)
  flips = sum(map(scene.flips, found, wanted))
  print(f"budget {budget}: {flips} flips; {busy.stats.reused_tokens} reused, "
        f"{busy.stats.evicted_tokens} evicted")
  assert flips <= 1
  assert (busy.stats.evicted_tokens > 0) == (budget < 9000)
  if budget == 9000:
    parents = sum(len(sequence(done)) - 1 for done in first)
    assert busy.stats.reused_tokens >= parents
  siblings = {}
  for done in found:
    if done.request.params.temperature:
      siblings.setdefault(done.request.prompt, []).append(tuple(done.tokens))
  for drawn in siblings.values():
    assert len(set(drawn)) == len(drawn) or len(min(drawn)) < 3
  assert max(map(len, siblings.values())) == 3


def test_a_sample_id_of_a_fork_is_the_documented_one():
  rng = np.random.default_rng(2)
  for _ in range(100):
    parent, draws = int(rng.integers(-2**31, 2**31)), int(rng.integers(2**30))
    message = parent.to_bytes(8, "little", signed=True) + draws.to_bytes(
        8, "little")
    found = {}
    for branch in (0, 1, 2, -1, 2**31 - 1, int(rng.integers(2**31))):
      code = zlib.crc32(message + branch.to_bytes(4, "little", signed=True))
      want = int(np.uint32(code).astype(np.int32))
      assert token_sampling.fork_id(parent, draws, branch) == want
      found[branch] = want
    assert len(set(found.values())) == len(found)
  with pytest.raises(ValueError, match="branch is 2147483648 and must lie"):
    token_sampling.fork_id(0, 0, 2**31)


def test_draws_are_no_matter_of_the_chunk_or_of_what_was_cut():
  """A stop string's surplus is no draw; retracted tokens are."""
  rng = np.random.default_rng(3)
  asked = [dataclasses.replace(
      scene.random_request(rng, i, longest=40), keep=True,
      stop_strings=(("ab", "gh"), ())[i % 2]) for i in range(16)]
  # A delimiter of two tokens is taken back for a wait.
  asked.append(dataclasses.replace(
      PLAIN, prompt=(12, 3), num_waits=1, script=np.array([13, 10, 11])))
  runs = [scene.take(scene.make_engine(
      symbols=TABLE, chunk=chunk, **BUDGET), asked) for chunk in (3, 8, 13)]
  for runs_of_one in zip(*runs, strict=True):
    done = runs_of_one[0]
    assert len({(done.draws, tuple(done.tokens)) for done in runs_of_one}) == 1
    assert all(len(done.tokens) <= done.draws <= len(done.raw)
               for done in runs_of_one)
  assert done.wait_count == 1 and done.draws > len(done.tokens)
  assert sum(done.surplus for done in runs[2]) > 0


def test_what_is_kept_ends_before_the_stop_string():
  """From its first token the text before it stays, spelt anew."""
  busy = scene.make_engine(scene.UNUSED, symbols=TABLE, **BUDGET)
  asked = [dataclasses.replace(
      PLAIN, max_tokens=60, prompt_id=i,
      stop_strings=("bc", "cd", "hij", "f")) for i in range(12)]
  first = scene.take(busy, asked)
  found = scene.take(busy, [continuation(done, (12, 13)) for done in first])
  heads = 0
  for done, after in zip(first, found, strict=True):
    kept = after.request.prompt[len(done.request.prompt):-2]
    said = text(done.tokens)
    if done.finish_reason == "stop":
      ends = [at for s in done.request.stop_strings
              if (at := said.find(s)) >= 0]
      assert text(kept) == said[:min(ends)]
      same = sum(a == b for a, b in zip(kept, done.tokens, strict=False))
      heads += same < len(kept)
    else:
      assert list(kept) == done.tokens
  assert heads > 1
  wanted = scene.take(
      whole_prompts(scene.UNUSED, symbols=TABLE), map(scene.alone, found))
  assert [done.tokens for done in found] == [done.tokens for done in wanted]


def test_an_included_stop_string_stays_in_what_is_kept():
  """The completion is the same; what goes on ends with its last token."""
  busy = scene.make_engine(scene.UNUSED, symbols=TABLE, **BUDGET)
  asked = [dataclasses.replace(
      PLAIN, max_tokens=60, prompt_id=i, include_stop=include,
      stop_strings=("bc", "cd", "hij", "f")) for i in range(8)
           for include in (False, True)]
  first = scene.take(busy, asked)
  found = scene.take(busy, [continuation(done, (12, 13)) for done in first])
  stopped = 0
  for (out, done), (_, after) in zip(
      zip(first[::2], first[1::2], strict=True),
      zip(found[::2], found[1::2], strict=True), strict=True):
    assert done.tokens == out.tokens and done.draws == out.draws
    assert done.kept == sequence(done)
    assert after.request.prompt == (*done.kept, 12, 13)
    if done.finish_reason == "stop":
      assert any(s in text(done.tokens) for s in done.request.stop_strings)
      assert not any(
          s in text(done.tokens[:-1]) for s in done.request.stop_strings)
      assert out.kept is not None and out.kept != done.kept
      stopped += 1
  assert stopped > 4
  for done, after in zip(first, found, strict=True):
    assert after.request.prompt == (*done.kept, 12, 13)
  wanted = scene.take(
      whole_prompts(scene.UNUSED, symbols=TABLE), map(scene.alone, found))
  assert [done.tokens for done in found] == [done.tokens for done in wanted]
  # What goes on is known of a request that is not kept, too.
  again = scene.take(whole_prompts(scene.UNUSED, symbols=TABLE), [
      dataclasses.replace(request, keep=False) for request in asked])
  assert [done.kept for done in again] == [done.kept for done in first]


def test_a_continuation_without_tokens_stays_in_its_phase():
  """It thinks on if its parent thought; else it has to open a section anew."""
  busy = scene.make_engine(**BUDGET)
  asked = [dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=9 + i % 2 * 20, prompt_id=i,
      min_thinking_tokens=9 - i % 2 * 9) for i in range(8)]
  first = scene.take(busy, asked)
  more = dict(max_tokens=6, min_thinking_tokens=0)
  found = scene.take(busy, [continuation(done, **more) for done in first])
  phases = set()
  for done, after in zip(first, found, strict=True):
    thinks = done.think_end == "open"
    phases.add(thinks)
    assert after.request.in_thinking is thinks
    assert after.think_length > 0 if thinks else (
        after.think_length == 0 or 3 in after.tokens)
  assert phases == {True, False}
  # What is asked for explicitly wins.
  [told] = scene.take(busy, [continuation(
      first[0], in_thinking=False, **more)])
  assert told.request.in_thinking is False


def test_a_group_that_is_kept_prefills_its_prompt_once():
  """Though its samples come one after the other, and each covers it."""
  busy = scene.make_engine(scene.UNUSED, **(BUDGET | dict(max_num_seqs=2)))
  asked = [dataclasses.replace(PLAIN, sample_id=i) for i in range(8)]
  scene.take(busy, asked)
  assert busy.stats.prefilled_tokens == len(PLAIN.prompt)
  assert busy.stats.reused_tokens == 7 * len(PLAIN.prompt)


# Each token is a letter, so that a stop string is a delimiter too.
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDE"
SPELLING = symbols.SymbolTable(
    [(ord(letter),) for letter in ALPHABET], lambda s: tuple(s.encode()),
    lambda s: tuple(ALPHABET.index(chr(each)) for each in s))


@pytest.mark.parametrize("prompt, choices, stop, thinks", [
    # Thinking is opened by token 3 ("d"), and ended by 4, 5 ("ef").
    ((12, 3), (13, 14, 4, 5), "ef", True),
    ((12, 3), (13, 14, 4, 5, 15), "p", False),
    ((12, 3), (4, 5), "ef", True),  # No token of it is left.
    ((12, 12), (13, 14, 3), "d", False),
    ((12, 12), (3,), "d", False),
    ((12, 12), (13, 3, 14), "o", True),
])
def test_the_phase_is_that_before_a_stop_string(prompt, choices, stop, thinks):
  busy = scene.make_engine(symbols=SPELLING, **BUDGET)
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, prompt=prompt, script=np.array(choices), stop_strings=(stop,))])
  assert done.finish_reason == "stop" and done.tokens == list(choices)
  [after] = scene.take(busy, [continuation(done, stop_strings=())])
  assert after.request.prompt == (*prompt, *choices[:-len(stop)]) == done.kept
  assert after.request.in_thinking is done.kept_in_thinking is thinks


@pytest.mark.parametrize("prompt, choices, stop, thinks", [
    ((12, 3), (13, 14, 4, 5), "ef", False),
    ((12, 3), (13, 14, 4), "e", True),
    ((12, 12), (13, 14, 3), "d", True),
    ((12, 12), (13, 14), "o", False),
])
def test_the_phase_is_that_behind_an_included_stop_string(
    prompt, choices, stop, thinks):
  busy = scene.make_engine(symbols=SPELLING, **BUDGET)
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, prompt=prompt, script=np.array(choices), stop_strings=(stop,),
      include_stop=True)])
  assert done.finish_reason == "stop" and done.tokens == list(choices)
  [after] = scene.take(busy, [continuation(done, stop_strings=())])
  assert after.request.prompt == (*prompt, *choices) == done.kept
  assert after.request.in_thinking is done.kept_in_thinking is thinks


def test_what_stands_before_a_stop_string_must_have_a_spelling():
  """It would be lost in what goes on: "ab" is a token here, and "a" is not."""
  words = ["ab", *"cdefghijklmnopqrstuvwxyzABCDEFG"][:scene.V]
  table = symbols.SymbolTable(
      [tuple(word.encode()) for word in words], lambda s: tuple(s.encode()),
      lambda s: ())
  busy = scene.make_engine(scene.UNUSED, symbols=table, **BUDGET)
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, script=np.array([3, 0, 4]), stop_strings=("b",))])
  assert done.finish_reason == "stop" and done.tokens == [3, 0]
  assert "cannot spell" in done.error and done.kept is None
  [after] = scene.take(busy, [continuation(done, [5])])
  assert "was not kept" in after.error


def test_the_transcript_knows_that_the_parent_had_opened_the_thinking():
  """The tokens of the prompt alone do not tell."""
  busy = scene.make_engine(symbols=SPELLING, **BUDGET)
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, prompt=(12, 3), script=np.array([13, 14]), max_tokens=2)])
  assert done.think_end == "open"
  [after] = scene.take(busy, [continuation(
      done, max_tokens=5, script=np.array([15, 16, 4, 5, 17]))])
  assert after.tokens == [15, 16, 4, 5, 17]
  assert after.think_end == "natural" and after.think_length == 2
  ids = busy.tables.ids
  found = transcript.split(rollouts.of_completions([after]), 0, ids)
  assert after.tokens[found.thinking.tokens] == [15, 16]
  assert after.tokens[found.answer.tokens] == [17]


def test_a_sequence_that_is_all_of_a_prompt_is_used():
  """But for its last token, whose hidden state was not kept."""
  busy = scene.make_engine(scene.UNUSED, symbols=SPELLING, **BUDGET)
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, script=np.arange(13, 23), stop_strings=("s",))])
  before = busy.stats.prefilled_tokens
  [after] = scene.take(busy, [continuation(done, stop_strings=())])
  assert after.request.prompt == (*PLAIN.prompt, *range(13, 18))
  assert busy.stats.prefilled_tokens == before + 1


def test_what_is_larger_than_the_budget_evicts_nothing_else():
  busy = scene.make_engine(scene.UNUSED, **(
      BUDGET | dict(prefix_cache_tokens=128, prefill_rows=1)))
  [small] = scene.take(busy, [PLAIN])
  large = dataclasses.replace(
      PLAIN, prompt=tuple(range(12, 30)) * 5, prompt_id=1)
  scene.take(busy, [large])
  assert [entry.tokens for entry in busy._prefill.cache.entries
          if len(entry.tokens) > 64] == []
  before = busy.stats.prefilled_tokens
  [after] = scene.take(busy, [continuation(small, (12,))])
  assert not after.error and busy.stats.prefilled_tokens == before + 2
  assert busy._prefill.cache.slots <= 128


def test_bad_continuations_err_alone():
  busy = scene.make_engine(**BUDGET)
  good = dataclasses.replace(PLAIN, keep=False)
  endless = dataclasses.replace(PLAIN, banned_ids=(2,))
  [kept, loose, long, gone] = scene.take(busy, [
      PLAIN, good, dataclasses.replace(endless, max_tokens=100), PLAIN])
  busy.release(gone.id)
  busy.release(10_000)  # Nothing.
  other = dataclasses.replace(good, parent=kept.id, prompt=())
  running = busy.submit(dataclasses.replace(endless, max_tokens=100))
  busy.step()
  waiting = [busy.submit(PLAIN) for _ in range(8)][-1]
  bad = [
      (dict(parent=9999), "parent is 9999, and there is no such request"),
      (dict(parent=-1), "parent is -1, and there is no"),
      (dict(parent=running), "has not ended"),
      (dict(parent=waiting), "has not ended"),
      (dict(parent=loose.id), "was not kept or was released"),
      (dict(parent=gone.id), "was not kept or was released"),
      (dict(parent=long.id, max_tokens=60), "need .* slots, and the cache has"),
      (dict(prompt=(scene.V,)), "outside of 0 to 30"),
      (dict(first_draw=-1), "first_draw is -1"),
  ]
  numbers = [busy.submit(dataclasses.replace(other, **change))
             for change, _ in bad]
  results = {done.id: done for done in busy.results()}
  for number, (_, message) in zip(numbers, bad, strict=True):
    assert results[number].finish_reason == "error"
    assert not results[number].tokens
    assert re.search(message, results[number].error), results[number].error
  assert results[waiting].tokens and results[running].tokens
  assert all(done.finish_reason != "error" for number, done in results.items()
             if number not in numbers)
  # Without a budget nothing can be kept, and that is said.
  [done] = scene.take(scene.make_engine(), [PLAIN])
  assert "no prefix cache. Raise its prefix_cache_tokens" in done.error


def test_other_weights_make_all_of_it_stale():
  busy = scene.make_engine(scene.UNUSED, **BUDGET)
  [kept, other] = scene.take(
      busy, [PLAIN, dataclasses.replace(PLAIN, prompt_id=1)])
  queued = busy.submit(continuation(kept, (12,)))
  plain = busy.submit(dataclasses.replace(PLAIN, prompt_id=2))
  held = sum(len(entry.tokens) for entry in busy._prefill.cache.entries)
  assert held >= len(sequence(kept)) + len(sequence(other)) - 2
  busy.use(busy.model)
  assert busy.stats.stale_tokens == held
  assert not busy._prefill.cache.entries
  late = busy.submit(continuation(other, (12,)))
  results = {done.id: done for done in busy.results()}
  for number in (queued, late):
    assert results[number].finish_reason == "error"
    assert "under other weights" in results[number].error
  assert results[plain].tokens
  # What is kept from then on is under these weights.
  [after] = scene.take(busy, [continuation(results[plain], (12,))])
  assert after.tokens and not after.error


def test_aborted_requests_can_go_on():
  busy = scene.make_engine(scene.UNUSED, **BUDGET)
  number = busy.submit(dataclasses.replace(PLAIN, max_tokens=60))
  never = [busy.submit(dataclasses.replace(PLAIN, prompt_id=i))
           for i in range(1, 8)][-1]
  busy.step()
  busy.abort(number)
  busy.abort(never)
  results = {done.id: done for done in busy.results()}
  done = results[number]
  assert done.finish_reason == "abort" and len(done.tokens) == 8
  queued = busy.submit(continuation(done))
  busy.abort(queued)
  busy.abort(queued + 1)  # There is no such request yet.
  later = busy.submit(continuation(done, max_tokens=2))
  left, last = sorted(busy.results(), key=lambda done: done.id)
  assert not left.tokens and left.draws == done.draws == 8
  assert last.id == later and last.finish_reason != "abort"
  [after] = scene.take(busy, [continuation(done, max_tokens=20)])
  [whole] = scene.take(whole_prompts(scene.UNUSED), [dataclasses.replace(
      PLAIN, max_tokens=28, keep=False)])
  assert done.tokens + after.tokens == whole.tokens
  [bad] = scene.take(busy, [continuation(results[never])])
  assert "was not kept" in bad.error


def converse(config, weights, **changes):
  """Two turns of several rows, forked; and the same from whole prompts."""
  engine = lambda **more: Engine(
      build.load(config, weights), scene.UNUSED.tables(), dataclasses.replace(
          scene.SETTINGS, **(BUDGET | changes | more)))
  rng = np.random.default_rng(4)
  busy = engine()
  said = lambda n: tuple(rng.integers(12, scene.V, n).tolist())
  first = scene.take(busy, [dataclasses.replace(
      PLAIN, prompt=said(5 + 7 * i), prompt_id=i, max_tokens=20)
                            for i in range(3)])
  found = scene.take(busy, [each for done in first for each in (
      continuation(done, said(6)), fork(done, 1, said(3)), fork(done, 2))])
  last = scene.take(busy, [
      continuation(done, said(2), keep=False) for done in found])
  found += last
  assert not any(done.error for done in found)
  # All but the last token of every parent came from the cache.
  assert busy.stats.reused_tokens >= sum(
      len(done.request.prompt) - 7 for done in found)
  assert len(busy.stats.programs) <= busy.most_programs
  return found, scene.take(
      engine(prefix_cache_tokens=0), map(scene.alone, found))


@pytest.mark.parametrize("mesh", [
    meshes.eight,
    pytest.param(meshes.with_context, marks=pytest.mark.slow)])
def test_meshes_continue(mesh):
  with jax.set_mesh(mesh()):
    found, wanted = converse(
        scene.CONFIG, scene.params(), max_num_seqs=8)
  one, _ = converse(scene.CONFIG, scene.params())
  for other in (wanted, one):
    assert gaps(found, other).max() < 5e-5


@pytest.mark.parametrize("option,mesh", [
    ("gemma", meshes.one), ("experts", meshes.with_experts)])
def test_models_continue(option, mesh):
  """Sliding windows, and experts on a mesh of their own, recorded."""
  config = build.make_config(
      **(build.OPTIONS[option] | dict(vocab_size=scene.V)))
  with jax.set_mesh(mesh()):
    found, wanted = converse(
        config, build.random_params(config), max_num_seqs=4)
  assert gaps(found, wanted).max() < (1e-4 if config.num_experts else 5e-5)
  for a, b in zip(found, wanted, strict=True):
    if config.num_experts:
      np.testing.assert_array_equal(a.experts, b.experts)
      assert (a.experts[:-1] > 0).all() and (a.experts[-1] == 0).all()


@pytest.mark.parametrize("config,changes,most", [
    (dict(dtype="bfloat16"), {}, 0.15),
    pytest.param({}, dict(cache_dtype="int8"), 0.15, marks=pytest.mark.slow),
    ({}, dict(cache_dtype="int8", weights_dtype="int8"), 0.15)],
    ids=["bfloat16", "int8 cache", "int8 both"])
def test_rounded_caches_continue(config, changes, most):
  """What was decoded is not bit for bit what a prefill computes."""
  config = build.make_config(**(config | dict(vocab_size=scene.V)))
  found, wanted = converse(config, build.random_params(config), **changes)
  apart = gaps(found, wanted, same=False)
  print(f"{apart.size} tokens: max {apart.max():.3f}, mean {apart.mean():.4f}")
  assert apart.max() < most and apart.mean() < most / 10 and apart.size > 60


def test_what_is_kept_is_the_cache_of_a_prefill():
  """Keys and values of a kept row, gathered out of a ring that went round."""
  busy = scene.make_engine(max_num_seqs=2, prefill_rows=1, **BUDGET)
  rng = np.random.default_rng(6)
  found = scene.take(busy, [dataclasses.replace(
      scene.random_request(rng, i, longest=40), keep=True) for i in range(9)])
  fresh = scene.make_engine(prefill_rows=1, **BUDGET)
  checked = 0
  for done in found:
    tokens = sequence(done)[:-1]
    scene.take(fresh, [Request(prompt=tokens, max_tokens=1)])
    (a, same), (b, other) = (
        engine._prefill.cache.find(tokens) for engine in (busy, fresh))
    assert same == other == len(tokens)
    for one, two in zip(*(jax.tree.leaves(
        [(layer.k, layer.v) for layer in entry.block.rows.cache.layers])
                          for entry in (a, b)), strict=True):
      take = lambda x, entry: np.asarray(x)[entry.row][
          :, np.argsort(at := np.asarray(
              entry.block.rows.cache.positions)[entry.row])[
                  (at < 0).sum():][:len(tokens)]]
      np.testing.assert_allclose(
          take(one, a), take(two, b), rtol=0, atol=2e-5)
      checked += 1
  assert checked >= 9 and busy.stats.steps > 64


