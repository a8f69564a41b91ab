"""Calls without an engine: gathers, hosts, and what cannot be made."""

import pytest

from posttrain.episodes.call import Call, Gather, Result
from posttrain.episodes.calls import Calls
from tests.episodes.scene import Pool

LENGTHS = "tests.episodes.scene:lengths"


def gathered(text, key="all", size=2, **changes):
  return Call(LENGTHS, (text,), gather=Gather(key, size), **changes)


def test_a_gather_waits_for_its_size_and_is_one_call():
  pool = Pool()
  calls = Calls(pool, seconds=3.0)
  numbers = [calls.submit(gathered(text)) for text in ("a", "bcd", "ef")]
  assert numbers == [0, 1, 2] and calls.pending == 3
  [made] = pool.made
  assert made == Call(LENGTHS, ([("a",), ("bcd",)],), seconds=6.0)
  assert calls.events() == [
      (0, Result("ok", 1, seconds=0.5)), (1, Result("ok", 3, seconds=0.5))]
  # The third is the first of the next one; another key is another gather.
  calls.submit(gathered("x", key="others"))
  assert calls.events() == [] and calls.pending == 2 and len(pool.made) == 1
  calls.submit(gathered("wxyz", seconds=1.5))
  assert pool.made[-1].seconds == 4.5
  assert [result.value for _, result in calls.events()] == [2, 4]


def test_a_gather_without_a_size_takes_those_that_are_there():
  pool = Pool()
  calls = Calls(pool)
  for text in ("a", "bcd"):
    calls.submit(gathered(text, size=0))
  assert not pool.made
  assert [result.value for _, result in calls.events()] == [1, 3]
  calls.submit(gathered("ef", size=0))
  assert [result.value for _, result in calls.events()] == [2]
  assert [len(call.args[0]) for call in pool.made] == [2, 1]


def test_a_gather_that_cannot_fill_is_made_with_those_that_came():
  pool = Pool(lambda number: 1)
  calls = Calls(pool)
  calls.submit(gathered("abc", size=9))
  calls.submit(Call("builtins:len", ("de",)))
  # The other call may lead to a further member.
  assert calls.events(alone=True) == [] and calls.events(alone=True) == [
      (1, Result("ok", 2, seconds=1.0))]
  assert len(pool.made) == 1
  assert calls.events() == []
  assert calls.events(alone=True) == []  # It is made now.
  assert calls.events(alone=True) == [(0, Result("ok", 3, seconds=1.0))]
  assert not calls.pending


@pytest.mark.parametrize("function, status, reason", [
    ("builtins:len", "error", "2 calls and returned a int"),
    ("tests.episodes.test_calls:one_value", "error", "a list of 1"),
    ("tests.episodes.test_calls:raises", "error", "KeyError"),
    ("tests.episodes.test_calls:no_such", "error", "no_such")])
def test_members_of_a_gather_share_its_failure(function, status, reason):
  calls = Calls(Pool())
  for text in ("a", "b"):
    calls.submit(Call(function, (text,), gather=Gather("all", 2)))
  events = calls.events()
  assert [number for number, _ in events] == [0, 1]
  for _, result in events:
    assert (result.status, result.value) == (status, None)
    assert reason in result.reason


def one_value(members):
  return [len(members)]


def raises(members):
  raise KeyError(len(members))


def test_a_call_that_cannot_join_ends_alone():
  pool = Pool()
  calls = Calls(pool)
  calls.submit(gathered("a"))
  calls.submit(Call("builtins:len", ("b",), gather=Gather("all", 2)))
  calls.submit(Call(LENGTHS, ("c",), {"k": 1}, gather=Gather("all", 2)))
  calls.submit(Call(LENGTHS, ("d",), gather=Gather([], 2)))
  calls.submit(gathered("ef"))
  events = dict(calls.events())
  assert [events[i].status for i in range(5)] == [
      "ok", "error", "error", "error", "ok"]
  assert "'builtins:len'" in events[1].reason
  assert "kwargs" in events[2].reason and "unhashable" in events[3].reason
  assert len(pool.made) == 1 and not calls.pending


def test_without_workers_each_call_is_an_error():
  calls = Calls(None)
  calls.submit(Call("builtins:len", ("b",)))
  [(number, result)] = calls.events(0.1)
  assert number == 0 and result.status == "error"
  assert "no workers" in result.reason and not calls.pending


def test_hosts_ask_only_while_something_is_pending():
  asked = []

  def share(ask):
    asked.append(ask)
    return ask()

  calls = Calls(Pool(), share=share)
  calls.events()
  calls.submit(gathered("a", size=2))
  calls.events()
  assert not asked
  calls.submit(gathered("b", size=2))
  calls.events()
  calls.events()
  assert len(asked) == 1


def test_cancelled_calls_are_forgotten():
  pool = Pool(lambda number: 2)
  calls = Calls(pool)
  calls.submit(Call("builtins:len", ("b",)))
  calls.submit(gathered("a"))
  calls.cancel()
  assert pool.cancelled and not calls.pending
  number = calls.submit(Call("builtins:len", ("bcd",)))
  for _ in range(3):
    events = calls.events()
  assert events == [(number, Result("ok", 3, seconds=1.0))]
