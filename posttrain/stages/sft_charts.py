"""Charts of the report for supervised fine-tuning."""

from posttrain.telemetry.charts import LEARNING, MACHINE, Chart

CHARTS = (
    Chart("Loss", {"loss": "training", "eval_loss": "held out"},
          caption="Mean negative log-likelihood per target token."),
    Chart("Entropy", {"entropy": "entropy"},
          caption="Of the next-token distribution, on target tokens."),
    *LEARNING,
    Chart("Tokens", {"target_frac": "in the loss", "pad_frac": "padding"},
          unit="share"),
    Chart("Throughput", {"perf/tokens_per_sec": "tokens/s"}),
    Chart("Time", {"time/step": "step", "time/eval": "evaluation"},
          unit="seconds"),
    Chart("Where a step's time goes", {
        "time/input_wait": "input", "time/dispatch": "host",
        "time/device_wait": "waiting for devices",
        "time/compile": "compiling"}, unit="seconds", stacked=True),
    *MACHINE,
)
