"""Charts of the report for reinforcement learning."""

from posttrain.telemetry.charts import LEARNING, MACHINE, Chart

CHARTS = (
    Chart("Reward", {"reward": "reward"}, spread={"reward": "reward_std"},
          caption="Mean over completions."),
    Chart("Lengths", {"completions/mean_length": "completion",
                      "think/mean_length": "thinking",
                      "answer/mean_length": "answer"},
          caption="Mean tokens of a completion and its parts."),
    Chart("Longest and shortest", {"completions/max_length": "longest",
                                   "completions/min_length": "shortest"}),
    Chart("Cut and closed", {"completions/clipped_ratio": "cut at max_tokens",
                             "think/forced_end_frac": "closed by the budget"},
          unit="share", caption="Share of completions."),
    Chart("Forced waits", {"think/wait_count": "forced"},
          caption="Mean number per completion."),
    Chart("Groups without signal", {"frac_reward_zero_std": "all equal",
                                    "frac_groups_solved": "all right"},
          unit="share"),
    Chart("Completions without a score", {"frac_unscored": "no score"},
          unit="share", optional=True, caption="A reward timed out or failed "
          "on them, or none applies; they leave their group."),
    Chart("Entropy", {"entropy": "entropy"}, caption="On sampled tokens."),
    Chart("KL to the reference", {"kl": "kl"}),
    Chart("Clipped ratios", {"clip_ratio/low_mean": "low",
                             "clip_ratio/high_mean": "high"},
          unit="share", caption="Share of sampled tokens."),
    Chart("Sampler against trainer", {
        "sampling/logp_difference/mean": "mean",
        "sampling/logp_difference/max": "max"}, log=True,
        caption="Absolute difference of the logprobs of sampled tokens."),
    *LEARNING,
    Chart("Where the time goes", {
        "time/rollout": "rollout", "time/reward": "reward",
        "time/prepare": "packing and logprobs",
        "time/learn": "learn"}, unit="seconds", stacked=True,
        caption="Learning is of one update, the rest of a whole batch."),
    Chart("Throughput", {"perf/tokens_per_sec": "completion tokens/s"}),
    *MACHINE,
)
