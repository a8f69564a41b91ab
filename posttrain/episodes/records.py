"""Records of episodes: what rewards are given, and what is saved for people."""

from collections.abc import Mapping
from typing import Any

from posttrain.episodes import rollouts
from posttrain.episodes.protocol import Turn
from posttrain.episodes.trajectory import Trajectory
from posttrain.sampler import transcript
from posttrain.tasks import scoring
from posttrain.text.tokenizer import Tokenizer


def completion_of(
    tokenizer: Tokenizer, trajectory: Trajectory) -> scoring.Completion:
  """Makes the texts and facts that the rewards of an episode are given.

  Those of several turns are of the turns that led to the last one: all their
  text with the observations, their thinking one after the other, and as
  messages the turns of the assistant and the observations of tools.
  """
  turns = trajectory.path()
  if not turns:
    return scoring.Completion(trajectory.answer, finish_reason="error")
  last = turns[-1]
  if len(turns) == 1:
    return scoring.Completion(
        answer=trajectory.answer, thinking=last.thinking, full_text=last.text,
        num_tokens=trajectory.num_tokens, finish_reason=last.finish_reason)
  return scoring.Completion(
      answer=trajectory.answer,
      thinking="\n".join(t.thinking for t in turns if t.thinking),
      full_text=transcript.completion_text(
          tokenizer, rollouts.joined(turns).tokens),
      num_tokens=trajectory.num_tokens, finish_reason=last.finish_reason,
      messages=_messages(tokenizer, turns))


def _messages(
    tokenizer: Tokenizer, turns: list[Turn]) -> list[dict[str, str]]:
  """Lists the messages behind the prompt."""
  found = []
  for turn in turns:
    if turn.parent is not None and turn.observation:
      found.append(dict(
          role="tool", content=tokenizer.decode(list(turn.observation))))
    found.append(dict(role="assistant", content=turn.text))
  return found


def failure_of(trajectory: Trajectory) -> str:
  """Says why an episode that has failed has no score, whatever its rewards."""
  return f"the episode has failed: {trajectory.outcome.reason_text}"


def details(trajectory: Trajectory) -> dict[str, Any]:
  """Makes the part of an episode's record that `Rollouts` does not have.

  It is JSON: the text that was judged, why the episode ended, its turns if
  there are several (with sums over them in place of the last one's counts), its
  calls, and of each score why it is missing and what its call has printed.
  """
  outcome, turns = trajectory.outcome, trajectory.turns
  found: dict[str, Any] = {
      "answer_text": trajectory.answer, "stop_reason": outcome.reason,
      "num_turns": len(turns)}
  if outcome.reason_text:
    found["stop_text"] = outcome.reason_text
  if outcome.rewards:
    found["turn_rewards"] = {
        str(number): float(x) for number, x in outcome.rewards.items()}
  if len(turns) > 1:
    done = [turn.completion for turn in turns]
    sums = {name: sum(getattr(each, name) for each in done)
            for name in rollouts.COUNTS}
    found |= sums | {"length": trajectory.num_tokens,
                     "turns": [_turn(turn) for turn in turns]}
  if trajectory.calls:
    found["calls"] = [
        {name: value for name, value in result._asdict().items()
         if name != "seconds" and value not in ("", None)}
        for result in trajectory.calls]
  outputs = {name: result.output
             for name, result in trajectory.scores.items() if result.output}
  return found | ({"outputs": outputs} if outputs else {})


def _turn(turn: Turn) -> Mapping[str, Any]:
  done = turn.completion
  return {
      "parent": turn.parent, "text": turn.text,
      "finish_reason": done.finish_reason, "length": len(done.tokens),
      "think_length": done.think_length,
      "observation_length": 0 if turn.parent is None else len(
          turn.observation)}
