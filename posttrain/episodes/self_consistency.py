"""Self-consistency: the answer that most of several samples give.

Wang et al., arXiv 2203.11171. Samples vote by what an extractor finds in their
answers; those in which it finds nothing do not vote.
"""

from collections import Counter

from posttrain.episodes import score_calls
from posttrain.episodes.protocol import Episode, Generate, Outcome, Task


def self_consistency(task: Task, *, samples: int, extract: str) -> Episode:
  """Draws samples side by side, and answers with the majority.

  Of answers with as many votes the one that was drawn first wins. The episode's
  answer is the text of the first sample that voted for it, so that a verifier
  judges it as it judges any other; without a vote, that of the first sample.

  Args:
    task: the problem.
    samples: number of samples.
    extract: function that spells the answer in a text canonically, or returns
      None, as "module:function" or "file.py:function".
  """
  turns = yield Generate(task.prompt, n=samples)
  turns = [turns] if samples == 1 else turns
  results = yield [
      score_calls.extract_call(extract, turn.answer) for turn in turns]
  found = [score_calls.extracted(result).answer for result in results]
  votes = Counter(answer for answer in found if answer is not None)
  if not votes:
    return Outcome(answer=turns[0].answer)
  [(winner, _)] = votes.most_common(1)  # In the order of their first votes.
  return Outcome(answer=turns[found.index(winner)].answer)
