"""A workdir like those of a run, with known numbers in it."""

import json
import pathlib

import numpy as np

STAGES = ("warm_up", "reason", "measure")
CONFIG = {
    "seed": 3, "model": "tiny", "stages": list(STAGES),
    "thinking": {"end": "</think>", "wait_text": "Wait"},
    "warm_up": {"kind": "sft", "num_steps": 60, "learning_rate": 1.5e-3},
    "reason": {"kind": "rl", "num_steps": 40, "learning_rate": 1e-4},
    "measure": {"kind": "evaluate", "max_thinking_tokens": [8, 16, 32, 64]},
}
ENVIRONMENT = {
    "time": "2025-01-02T03:04:05Z", "command": ["posttrain", "train"],
    "python": "3.11.0", "platform": "Linux-x", "cores": 2,
    "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    "git": {"commit": "0123456789abcdef", "changed": ["a.py"]},
    "devices": ["cpu cpu"] * 8, "sources": {},
}
NASTY = "</script><img src=x onerror=alert(1)> & \u2028 \x1b[2J"


def write_json(path: pathlib.Path, data) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(data, ensure_ascii=False))


def write_lines(path: pathlib.Path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(
      json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def metrics(seed: int):
  rng = np.random.default_rng(seed)
  noise = lambda scale: float(rng.normal() * scale)
  for step in range(1, 61):
    row = {
        "stage": "warm_up", "step": step,
        "loss": 0.5 + 2.5 * np.exp(-step / 15) + noise(0.03),
        "grad_norm": float(np.exp(-step / 40 + noise(0.2))),
        "learning_rate": 1.5e-3 * (1 - step / 60),
        "entropy": 0.6 + np.exp(-step / 15), "target_frac": 0.8,
        "pad_frac": 0.03, "num_tokens": 4096 * step, "time/step": 0.11,
        "time/input_wait": 0.01, "time/dispatch": 0.02,
        "time/device_wait": 0.07, "time/compile": 0.0, "perf/mfu": 0.41,
        "perf/tokens_per_sec": 31000.0 + noise(900)}
    if step % 20 == 0:
      row |= {"eval_loss": 0.62 + 2 * np.exp(-step / 14), "time/eval": 0.4}
    yield row
  for step in range(1, 41):
    reward = 0.35 + 0.5 * (1 - np.exp(-step / 12)) + noise(0.03)
    row = {
        "stage": "reason", "step": step, "loss": noise(0.01),
        "reward": reward, "reward_std": float(np.sqrt(reward * (1 - reward))),
        "rewards/score/mean": reward, "rewards/score/std": 0.4,
        "frac_reward_zero_std": 0.1 + step / 80,
        "frac_groups_solved": step / 80,
        "advantages/abs_mean": 0.7, "completions/mean_length": 46 + step / 2,
        "completions/min_length": 12, "completions/max_length": 128,
        "completions/clipped_ratio": 0.1, "answer/mean_length": 9.0,
        "think/mean_length": 37 + step / 2, "think/forced_end_frac": 0.0,
        "think/wait_count": 0.0, "num_tokens": 9000,
        "entropy": 0.5 - step / 200 + noise(0.01), "ratio/mean": 1.0,
        "clip_ratio/low_mean": 0.004, "clip_ratio/high_mean": 0.006,
        "grad_norm": 0.3 if step != 7 else None, "learning_rate": 1e-4,
        "time/learn": 1.5 + noise(0.1), "time/step": 4.0}
    if step % 2:
      row |= {"time/rollout": 2.4 + noise(0.2), "time/reward_wait": 0.05,
              "perf/tokens_per_sec": 2300 + noise(80),
              "sampling/logp_difference/mean": 1e-6,
              "sampling/logp_difference/max": 2e-5}
    yield row


def completion(rng, right: bool):
  a, b = (int(x) for x in rng.integers(1, 9, 2))
  segments = [
      [f" Wait {a} - {b} = {a - b} NO", "sampled"], [" Wait", "wait"],
      [f" {a} + {b} = {a + b} OK", "sampled"], [" </think>", "forced"],
      [f" {a} {'+' if right else '-'} {b} <eos>", "sampled"]]
  return f"{a} {b} : {a + b} <think>", segments


def record(rng, i: int, right: bool):
  prompt, segments = completion(rng, right)
  return {
      "prompt_id": i // 2, "sample_id": i % 2, "prompt": prompt,
      "completion": "".join(text for text, _ in segments),
      "segments": segments, "finish_reason": "eos", "think_end": "budget",
      "think_length": 15, "answer_length": 4, "length": 20, "wait_count": 1,
      "reward": float(right)}


def evaluation(name: str, level: float, growth: float, *, n: int = 100):
  rng = np.random.default_rng(0)
  cells, records, flips = [], [], []
  settings = [(-1, 0), *((m, 0) for m in (8, 16, 32, 64)),
              *((-1, w) for w in (1, 2, 4))]
  for maximum, waits in settings:
    tokens = min(maximum, 48) if maximum >= 0 else 48 + 18 * waits
    accuracy = round(min(0.97, level + growth * float(np.log2(tokens / 8))), 2)
    label = (f"max_{maximum}" if maximum >= 0
             else f"waits_{waits}" if waits else "free")
    cells.append({
        "name": label, "max_thinking_tokens": maximum, "num_waits": waits,
        "n": n, "samples": 1, "accuracy": accuracy,
        "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / n)),
        "mean_thinking_tokens": float(tokens), "mean_tokens": tokens + 8.0,
        "median_thinking_tokens": float(tokens), "no_answer": 0.01,
        "p95_thinking_tokens": float(tokens), "pass@k": {"1": accuracy},
        "maj@k": {"1": accuracy},
        "finish": {"eos": 0.9, "budget": 0.1, "length": 0.0, "stop": 0.0}}
        | ({"control": 1.0} if maximum >= 0 else {}))
    records += [
        record(rng, 2 * i, i < accuracy * n) | {
            "id": i, "cell": label, "correct": i < accuracy * n,
            "answer": "1 + 1"} for i in range(n)]
  for a, b in ((0, 1), (1, 2), (2, 4)):
    flips.append({"from_waits": a, "to_waits": b, "correct_to_wrong": 3,
                  "wrong_to_correct": 9 + b, "n": n})
  return {
      "checkpoint": name, "cells": cells, "records": records,
      "decoding": {"temperature": 1.0, "seed": 3, "split": "test"},
      "summary": {
          "flips": flips, "control_per_sample": 1.0, "control_per_run": 1.0,
          "scaling_per_doubling": 0.08125, "scaling_per_1k": 6.5,
          "performance": 0.77, "majority_baseline": [
              {"samples": k, "mean_tokens": 48.0 * k,
               "accuracy": level + growth * 2.5 + 0.02 * k,
               "standard_error": 0.04} for k in range(1, 5)]}}


def write(path: pathlib.Path, *, seed: int = 0, nasty: bool = False,
          learning_rate: float = 1e-4) -> pathlib.Path:
  """A finished run of three stages."""
  rng = np.random.default_rng(seed)
  config = CONFIG | {
      "reason": CONFIG["reason"] | {"learning_rate": learning_rate}}
  write_json(path / "config.json", config)
  write_json(path / "environment.json", [ENVIRONMENT])
  write_lines(path / "metrics.jsonl", metrics(seed))
  write_json(path / "warm_up" / "data_report.json", {
      "data": {"examples": 16000, "padding_share": 0.031,
               "lengths": {"p50": 44}}})
  write_json(path / "warm_up" / "goodput.json", {
      "written": 1.7e9, "starts": 3, "marks": [[20, 60.0]], "seconds": {
          "train": 60.0, "compile": 20.0, "input_wait": 1.0,
          "checkpoint": 3.0, "evaluation": 3.5, "profile": 0.5, "setup": 2.0,
          "restart": 10.0}})
  for step in (0, 20, 38):
    rows = [
        record(rng, i, rng.random() < 0.3 + step / 80) | {
            "step": step, "advantage": 0.5, "rewards": {"score": 1.0}}
        for i in range(80)]
    if nasty:
      rows[0]["prompt"] = NASTY
      rows[0]["segments"][0][0] = NASTY
    write_lines(
        path / "reason" / "rollouts" / f"step_{step:06d}.jsonl", rows)
  for name, level, growth in (
      ("init", 0.0, 0.01), ("reason", 0.35, 0.16), ("warm_up", 0.14, 0.09)):
    write_json(path / "measure" / "eval" / f"{name}.json",
               evaluation(name, level + 0.01 * seed, growth))
  for name in STAGES:
    write_json(path / name / "done.json", {"step": 40})
  return path
