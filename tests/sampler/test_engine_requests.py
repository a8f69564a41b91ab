"""Options of a single request. Oracles: NumPy, free runs."""

import dataclasses
import gc
import re

import jax
import numpy as np
import pytest

from posttrain.sampler import (
  decode,
  logits_processors,
  requests,
  token_sampling,
)
from posttrain.sampler.engine import Engine
from posttrain.sampler.requests import Request
from posttrain.text import symbols
from posttrain.text.stop_strings import Matcher, Stop
from tests import meshes
from tests.model import build, numpy_transformer
from tests.sampler import engine_scene as scene
from tests.sampler import test_token_sampling
from tests.text import build as build_text

# Text of an id: of no, one and several characters.
WORDS = ["", "a", "", "b", "ab", "ba", "c", "abc", "é", " ", "cab", "bb", "-",
         *"defghijklmnopqrst", "x-"]
TABLE = scene.table_of(WORDS)
PLAIN = Request(prompt=(12, 13, 14), max_tokens=20)


def text(tokens):
  return "".join(WORDS[token] for token in tokens)


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def cut(tokens, strings):
  """The least beginning whose text has a stop string in it, or all."""
  return next((tokens[:n] for n in range(1, len(tokens) + 1)
               if any(s in text(tokens[:n]) for s in strings)), tokens)


def test_stop_strings_are_exact_across_tokens():
  """Whatever the chunk; what was drawn behind them is cut and counted."""
  rng = np.random.default_rng(0)
  free = [scene.random_request(rng, i) for i in range(36)]
  strings = [[("ab", "zz"), ("d-e", "c"), ("bab",), ("é ", "gh", "-f")][i % 4]
             for i in range(36)]
  asked = [dataclasses.replace(r, stop_strings=s)
           for r, s in zip(free, strings, strict=True)]
  whole = scene.take(scene.make_engine(), free)
  runs = [scene.take(scene.make_engine(symbols=TABLE, chunk=chunk), asked)
          for chunk in (8, 5)]
  stopped = surplus = 0
  for i, (done, again) in enumerate(zip(*runs, strict=True)):
    want = cut(whole[i].tokens, strings[i])
    assert done.tokens == again.tokens == want
    ends = any(s in text(want) for s in strings[i])
    assert done.finish_reason == (
        "stop" if ends else whole[i].finish_reason)
    assert done.surplus == 0 or ends
    stopped += ends
    surplus += done.surplus
    for name in ("think_length", "answer_length", "wait_count", "think_end"):
      assert getattr(done, name) == getattr(again, name)
  assert stopped > 10 and surplus > 10


def test_the_counts_of_a_stopped_row_are_of_what_it_kept():
  """They are those of a row that ends there by its length."""
  free = dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=60, num_waits=1)
  asked = [dataclasses.replace(free, prompt_id=i) for i in range(20)]
  stopped = scene.take(scene.make_engine(symbols=TABLE), [
      dataclasses.replace(r, stop_strings=("g", "ab")) for r in asked])
  kept = [len(done.tokens) for done in stopped]
  short = scene.take(scene.make_engine(), [
      dataclasses.replace(r, max_tokens=n)
      for r, n in zip(asked, kept, strict=True)])
  checked = 0
  for a, b in zip(stopped, short, strict=True):
    # Not of the same length: what the one took back, the other could not.
    if a.finish_reason == "stop" and a.tokens == b.tokens:
      for name in ("think_length", "answer_length", "wait_count"):
        assert getattr(a, name) == getattr(b, name)
      checked += a.surplus > 0
  assert checked > 3


@pytest.mark.parametrize("strings", [
    ("ab",), ("aab", "b-"), ("cabbage",), ("ab", "cab", "b"), ("\u00e9b",)])
def test_a_matcher_finds_what_a_search_of_the_whole_text_finds(strings):
  rng = np.random.default_rng(len(strings[0]))
  parsed = [TABLE.parse(string) for string in strings]
  heads = 0
  for _ in range(200):
    tokens = rng.integers(0, 13, rng.integers(1, 40)).tolist()
    matcher, looked, found = Matcher(parsed, TABLE.tokens), 0, None
    want = cut(tokens, strings)
    ends = any(s in text(want) for s in strings)
    whole = text(want)
    # The first that is complete; of those, the one that begins first.
    _, first = min((whole.find(s) + len(s), whole.find(s))
                   for s in strings if s in whole) if ends else (0, len(whole))
    while found is None and looked < len(tokens):
      looked = min(looked + int(rng.integers(1, 7)), len(tokens))
      found = matcher.find(tokens[:looked])
      if found is None:
        # Whatever comes next, a string does not begin in what is settled.
        assert len(text(tokens[:matcher.settled(tokens[:looked])])) <= first
    assert (found.end if found else -1) == (len(want) if ends else -1)
    if found:
      head = text(tokens[found.begin:]).encode()[:found.head].decode()
      assert text(tokens[:found.begin]) + head == whole[:first]
      assert not head or len(head) < len(WORDS[tokens[found.begin]])
      heads += bool(head)
  assert heads or strings not in (("ab",), ("aab", "b-"))


def test_typed_text_never_equals_a_control_token():
  tokenizer = build_text.merging()
  table = symbols.SymbolTable.of(tokenizer)
  named = [table.parse("x<|im_start|>")]
  x, control = tokenizer.encode("x<|im_start|>", special=True)
  typed = tokenizer.encode("x<|im_start|>y")
  assert Matcher(named, table.tokens).find(typed) is None
  # It begins inside of a token, and ends in the control token.
  begin = table.tokens.index(tuple(b">x"))
  found = Matcher(named, table.tokens).find([*typed, begin, control, x])
  assert found == Stop(len(typed) + 2, len(typed), 1)
  assert Matcher([table.parse("start")], table.tokens).find([control]) is None


def test_a_stop_string_of_unknown_words_is_an_error():
  words = build_text.words()
  engine = scene.make_engine(symbols=symbols.SymbolTable.of(words))
  [done] = scene.take(engine, [dataclasses.replace(
      PLAIN, stop_strings=("6 zebra",))])
  assert done.finish_reason == "error" and "'6 zebra'" in done.error


def test_stop_ids_and_bans_are_the_requests_own():
  rng = np.random.default_rng(1)
  asked, without = [], []
  for i in range(24):
    request = dataclasses.replace(
        PLAIN, max_tokens=40, prompt_id=i,
        params=token_sampling.SamplingParams(temperature=2.0))
    own = tuple(rng.choice(np.arange(12, scene.V), 3, replace=False).tolist())
    without.append(request)
    asked.append(dataclasses.replace(request, **(
        dict(stop_ids=own) if i % 2 else dict(banned_ids=own))))
  strings = scene.UNUSED
  found = scene.take(scene.make_engine(strings), asked)
  free = scene.take(scene.make_engine(strings), without)
  hit = 0
  for request, done, plain in zip(asked, found, free, strict=True):
    if request.stop_ids:
      at = [i for i, t in enumerate(plain.tokens) if t in request.stop_ids]
      want = plain.tokens[:at[0] + 1] if at else plain.tokens
      assert done.tokens == want
      assert not at or done.finish_reason == "eos"
      hit += bool(at)
    else:
      assert not set(done.tokens) & set(request.banned_ids)
      assert_distribution(done, banned=request.banned_ids, temperature=2.0)
      hit += bool(set(plain.tokens) & set(request.banned_ids))
  assert hit > 12


def full_logits(done):
  """[n, V] float64 under the NumPy transformer, of each token drawn."""
  sequence = [*done.request.prompt, *done.tokens]
  return numpy_transformer.logits(scene.params(), scene.CONFIG, sequence)[
      len(done.request.prompt) - 1:-1]


def assert_distribution(done, logits=None, **sampling):
  """The logprobs are of the exact distribution, token by token."""
  logits = full_logits(done) if logits is None else logits
  want = [np.log(test_token_sampling.exact(row, **sampling)[token])
          for row, token in zip(logits, done.tokens, strict=True)]
  np.testing.assert_allclose(done.logprobs, want, rtol=0, atol=5e-5)


def test_logprobs_of_the_model_and_of_the_top_tokens():
  sampling = dict(temperature=0.7, top_k=9)
  busy = scene.make_engine(scene.UNUSED, recorded=decode.Recorded(
      model_logprobs=True, top_logprobs=3))
  [done] = scene.take(busy, [dataclasses.replace(
      PLAIN, params=token_sampling.SamplingParams(**sampling))])
  logits = full_logits(done)
  assert_distribution(done, logits, **sampling)
  assert_distribution(
      dataclasses.replace(done, logprobs=done.model_logprobs), logits)
  for row, ids, values in zip(
      logits, done.top_tokens, done.top_logprobs, strict=True):
    want = test_token_sampling.exact(row, **sampling)
    assert ids.tolist() == np.argsort(-want)[:3].tolist()
    np.testing.assert_allclose(values, np.log(want[ids]), rtol=0, atol=5e-5)


def test_rows_of_one_batch_follow_distributions_of_their_own():
  """Every truncation, alone and combined, side by side in one program.

  Chi-square at a false-alarm rate of 1e-6 a case, 1.2e-5 in all; the seed is
  fixed.
  """
  cases = [dict(c) for c in test_token_sampling.CASES if "banned" not in c]
  cases.append(dict(top_k=5, top_p=0.7, min_p=0.2))
  draws = 8000
  params = token_sampling.RowParams.of(
      [token_sampling.SamplingParams(**case) for case in cases for _ in range(
          draws)])
  rows = np.arange(len(cases) * draws, dtype=np.int32)
  keys = token_sampling.row_keys(1, "mixed", 0, rows // 7, rows % 7)
  logits = np.tile(test_token_sampling.LOGITS, (len(rows), 1))
  tokens, logprobs = jax.jit(test_token_sampling.choose)(logits, None, keys,
      params)
  for i, case in enumerate(cases):
    part = slice(i * draws, (i + 1) * draws)
    expected = test_token_sampling.exact(test_token_sampling.LOGITS, **case)
    np.testing.assert_allclose(
        logprobs[part], np.log(expected[tokens[part]]), atol=2e-6)
    counts = np.bincount(tokens[part], minlength=10)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    wanted = draws * expected[kept]
    statistic = ((counts[kept] - wanted) ** 2 / wanted).sum()
    d = kept.sum() - 1
    limit = d * (1 - 2 / (9 * d) + 4.75 * np.sqrt(2 / (9 * d))) ** 3
    assert statistic < limit, (case, statistic, limit)


def test_a_bias_is_added_where_it_is_asked_for():
  busy = scene.make_engine(
      scene.UNUSED, logits_processor=logits_processors.token_bias(scene.V))
  biases = {14: 3.0, 15: -2.0, 2: -1e9}
  asked = [dataclasses.replace(
      PLAIN, prompt_id=i, logits_processor_args=biases if i % 2 else None)
           for i in range(12)]
  for request, done in zip(asked, scene.take(busy, asked), strict=True):
    logits = full_logits(done)
    if request.logits_processor_args:
      logits[:, list(biases)] += list(biases.values())
    assert_distribution(done, logits)


@pytest.mark.parametrize("change, message", [
    ({"logits_processor_args": {"nonsense": 1}}, "refuses .*ValueError"),
    ({"script": np.array([scene.V])}, "token ids below"),
    ({"script": np.zeros((2, 2), int)}, r"shape \(2, 2\)"),
    ({"script": np.zeros(2)}, "type float64"),
])
def test_a_users_mistake_in_one_request_is_its_error(change, message):
  busy = scene.make_engine(
      scene.UNUSED, logits_processor=logits_processors.token_bias(scene.V))
  good, bad = scene.take(busy, [PLAIN, dataclasses.replace(PLAIN, **change)])
  assert good.tokens and not good.error
  assert not bad.tokens and re.search(message, bad.error)


def test_a_repetition_penalty_is_that_of_its_definition():
  """Mixed with rows that have none, and rows that had another's state."""
  busy = scene.make_engine(
      scene.UNUSED,
      logits_processor=logits_processors.repetition_penalty(scene.V))
  asked = [dataclasses.replace(
      PLAIN, prompt_id=i, logits_processor_args=[
          None, {"penalty": 1.8}, {"penalty": 0.6}][i % 3])
           for i in range(15)]
  for request, done in zip(asked, scene.take(busy, asked), strict=True):
    logits = full_logits(done)
    penalty = (request.logits_processor_args or {"penalty": 1.0})["penalty"]
    for step, row in enumerate(logits):
      for token in {*request.prompt, *done.tokens[:step]}:
        row[token] *= 1 / penalty if row[token] > 0 else penalty
    assert_distribution(done, logits)


def test_logits_that_are_not_numbers_fail_their_row_alone():
  """One id's embedding is NaN: rows that read it fail, then and later."""
  config = build.make_config(vocab_size=scene.V, tied_embeddings=False)
  weights = build.random_params(config)
  clean = build.load(config, weights)
  weights["embedding"][20] = np.nan
  good = [dataclasses.replace(
      PLAIN, prompt_id=i, banned_ids=(20,)) for i in range(10)]
  bad = dataclasses.replace(PLAIN, prompt=(12, 20))
  broken = scene.make_engine(scene.UNUSED)
  broken.use(build.load(config, weights))
  found = scene.take(broken, [r for g in good for r in (bad, g)])
  healthy = scene.make_engine(scene.UNUSED)
  healthy.use(clean)
  want = scene.take(healthy, [r for g in good for r in (PLAIN, g)])[1::2]
  for done in found[::2]:
    assert done.finish_reason == "error" and done.tokens == []
    assert "not finite" in done.error
  # Rows whose cache held NaNs serve the next request as if it had not.
  assert [d.tokens for d in found[1::2]] == [d.tokens for d in want]


def test_streams_add_up_and_others_go_on():
  rng = np.random.default_rng(2)
  asked = [scene.random_request(rng, i) for i in range(12)]
  asked = [dataclasses.replace(r, stop_strings=("abd", "gh")) for r in asked]
  want = scene.take(scene.make_engine(symbols=TABLE), asked)
  busy = scene.make_engine(symbols=TABLE, chunk=3)
  numbers = [busy.submit(request) for request in asked]
  parts = [list(busy.stream(number)) for number in numbers[::2]]
  assert any(len(part) > 2 for part in parts)
  for pieces, done in zip(parts, want[::2], strict=True):
    assert [t for tokens, _ in pieces for t in tokens] == done.tokens
    assert [p for _, kinds in pieces for p in kinds] == (
        done.provenance.tolist())
  results = {done.id: done for done in busy.results()}
  assert [results[n].tokens for n in numbers] == [d.tokens for d in want]
  assert list(busy.stream(numbers[0])) == []  # It was taken.


def test_an_engine_leaves_the_devices_when_it_goes():
  """At once, and not when Python looks for cycles."""
  model = build.load(scene.CONFIG, scene.params())
  gc.collect()
  gc.disable()
  try:
    before = len(jax.live_arrays())
    busy = Engine(model, scene.STRINGS.tables(), dataclasses.replace(
        scene.SETTINGS, prefix_cache_tokens=1000))
    scene.take(busy, [dataclasses.replace(PLAIN, keep=True)])
    held = len(jax.live_arrays())
    assert held > before and busy._prefill.cache.entries
    busy.use(model)
    assert len(jax.live_arrays()) < held
    scene.take(busy, [dataclasses.replace(PLAIN, keep=True)])
    del busy
    assert len(jax.live_arrays()) == before
  finally:
    gc.enable()


def test_aborted_requests_leave_the_others_alone():
  asked = [dataclasses.replace(PLAIN, prompt_id=i, max_tokens=30)
           for i in range(10)]
  want = scene.take(scene.make_engine(scene.UNUSED), asked)
  busy = scene.make_engine(scene.UNUSED)
  numbers = [busy.submit(request) for request in asked]
  busy.step()
  for number in (1, 9, 1):
    busy.abort(number)
  results = {done.id: done for done in busy.results()}
  for number, done in zip(numbers, want, strict=True):
    found = results[number]
    if number in (1, 9):
      assert found.finish_reason == "abort"
      assert found.tokens == done.tokens[:len(found.tokens)]
      assert (0 < len(found.tokens) <= 8) == (number == 1)
    else:
      assert found.tokens == done.tokens


def test_weights_do_not_change_under_active_sequences():
  busy = scene.make_engine(scene.UNUSED)
  busy.submit(dataclasses.replace(PLAIN, banned_ids=(2,)))
  busy.step()
  with pytest.raises(RuntimeError, match="under active sequences"):
    busy.use(busy.model)


@pytest.mark.parametrize("least, chunk, most, sizes", [
    (96, 32, 192, [96, 128, 192]), (64, 32, 64, [64]), (108, 8, 103, [128]),
    # 1,088 to 1,280 would be less than a quarter more.
    (1056, 32, 2048, [1056, 1536, 2048]), (64, 32, 300, [64, 96, 160, 288, 320])
])
def test_a_ring_doubles_its_part_for_the_completion(least, chunk, most, sizes):
  assert requests.Settings(
      1, most, min_seq_len=least, chunk=chunk).sizes == sizes


def test_max_num_seqs_is_whole_rows_of_the_mesh():
  with jax.set_mesh(meshes.eight()), pytest.raises(
      ValueError, match="multiple of 4"):
    scene.make_engine(max_num_seqs=6)


def test_padding_of_the_vocabulary_is_never_sampled():
  """31 ids of 128, at a temperature where every one of them occurs."""
  busy = scene.make_engine(scene.Strings(vocab_size=scene.V))
  found = scene.take(busy, [dataclasses.replace(
      PLAIN, prompt_id=i, max_tokens=60,
      params=token_sampling.SamplingParams(temperature=50.0)) for i in range(
      12)])
  seen = {token for done in found for token in done.tokens}
  assert seen == set(range(scene.V))


def forced_runs(done):
  """The strings that were forced, in order."""
  runs, last = [], None
  for token, source in zip(done.tokens, done.provenance, strict=True):
    if source == 2:
      runs += [[]] if last != 2 else []
      runs[-1].append(token)
    last = source
  return [tuple(run) for run in runs]


def test_waits_take_their_texts_in_the_order_asked_for():
  strings = dataclasses.replace(scene.STRINGS, more_waits=((12, 13), (14,)))
  texts = [strings.wait, *strings.more_waits]
  orders = [(), (2,), (1, 0), (1, 1, 2)]
  asked = [dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=70, num_waits=5, prompt_id=i,
      wait_order=orders[i % 4]) for i in range(16)]
  asked[0] = dataclasses.replace(
      asked[0], wait_order=requests.drawn_waits(asked[0], 4, 3))
  waits = 0
  for request, done in zip(
      asked, scene.take(scene.make_engine(strings), asked), strict=True):
    order = request.wait_order or (0, 1, 2)
    want = [texts[order[i % len(order)]] for i in range(done.wait_count)]
    found = forced_runs(done)[:done.wait_count]
    # The last may have been cut off by the length.
    assert found[:-1] == want[:-1]
    assert not want or want[-1][:len(found[-1])] == found[-1]
    waits += done.wait_count
  assert waits > 16
  [bad] = scene.take(scene.make_engine(strings), [
      dataclasses.replace(PLAIN, wait_order=(3,))])
  assert "there are 3" in bad.error


def test_reflections_are_left_out_of_the_thinking_that_asks_for_it():
  words = tuple(range(14, 24))
  strings = dataclasses.replace(scene.STRINGS, reflections=words)
  asked = [dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=30, min_thinking_tokens=30,
      prompt_id=i, suppress=bool(i % 2)) for i in range(12)]
  for request, done in zip(
      asked, scene.take(scene.make_engine(strings), asked), strict=True):
    assert done.think_length == len(done.tokens) == 30  # All of it.
    assert bool(set(done.tokens) & set(words)) == (not request.suppress)


def half(budgets, state):
  """Budget schedule: half of what was asked for."""
  del state
  return dataclasses.replace(
      budgets, max_thinking_tokens=budgets.max_thinking_tokens // 2)


def test_a_budget_schedule_moves_the_budgets():
  """The result is that of asking for half."""
  asked = [dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=60, num_waits=1, prompt_id=i,
      max_thinking_tokens=4 + 2 * i) for i in range(10)]
  halved = [dataclasses.replace(
      r, max_thinking_tokens=r.max_thinking_tokens // 2) for r in asked]
  for a, b in zip(scene.take(scene.make_engine(budget_schedule=half), asked),
                  scene.take(scene.make_engine(), halved), strict=True):
    assert a.tokens == b.tokens and a.think_length == b.think_length
    assert a.think_length <= a.request.max_thinking_tokens // 2


@pytest.mark.parametrize("maximum", [0, 1, -1])
def test_budgets_of_nothing_one_and_none(maximum):
  """Forced rows beside free ones; the closing does not count."""
  asked = [dataclasses.replace(
      PLAIN, prompt=(12, 3), max_tokens=20, prompt_id=i,
      max_thinking_tokens=maximum if i % 2 else -1) for i in range(8)]
  for request, done in zip(
      asked, scene.take(scene.make_engine(), asked), strict=True):
    told, _, _ = scene.redrawn(done)
    assert done.tokens == told.tokens
    if request.max_thinking_tokens >= 0:
      assert done.think_length == maximum and done.think_end == "budget"
      assert done.finish_reason in ("budget", "length")
      # Newline, end and final answer.
      assert done.tokens[maximum:maximum + 4] == [1, 4, 5, 6]
