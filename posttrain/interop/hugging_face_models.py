"""Hugging Face models: config.json to ModelConfig and back, names of tensors.

A family is a row of `FAMILIES`: the fields that all of its models have, and
the keys of its config.json in addition to the common ones. Keys are read in the
spelling of transformers 4 (`rope_theta`, `rope_scaling`) and of 5
(`rope_parameters`), and written in that of 4, which both read.

An unknown key is an error unless it is off (false, null, 0): it might change
what the model computes.

Source: `configuration_*.py` and `modeling_*.py` of transformers, 5.24.
"""

from collections.abc import Mapping
from typing import Any

from posttrain.interop import parameters
from posttrain.interop.hugging_face_families import FAMILIES, MOE, Family
from posttrain.model.config import ModelConfig, RopeScaling

SIZES = {
    "vocab_size": "vocab_size", "embed": "hidden_size",
    "mlp": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads"}

ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}
KINDS = {"global": "full_attention", "local": "sliding_attention"}
SCALINGS = {  # Our fields of a RoPE scaling, and transformers' keys.
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings"}}

# Known keys that do not affect the computation: the release's origin, token
# ids, initialisation, kind of cache, recommended sampling, and notes of other
# programs.
INERT = {
    "architectures", "model_type", "transformers_version", "torch_dtype",
    "dtype", "use_cache", "cache_implementation", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "pretraining_tp", "id2label", "label2id", "return_dict",
    "chunk_size_feed_forward", "do_sample", "temperature", "top_k", "top_p",
    "max_length", "router_aux_loss_coef", "output_router_logits",
    "is_llama_config", "transformers.js_config",
    "sliding_window_size"}  # Gemma 2 has a second name for it.

# Tensors of parameters. The name of a norm depends on the norms' placement,
# since "post_attention_layernorm" is `mlp_norm` in some families.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight", "head": "lm_head.weight",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight"}
EXPERTS = {
    "router": "mlp.gate.weight",
    **{name: f"mlp.experts.{{expert}}.{name}_proj.weight"
       for name in ("gate", "up", "down")}}
BETWEEN = "pre_feedforward_layernorm.weight"  # `mlp_norm`, if both are there.


def table(config: ModelConfig) -> dict[str, parameters.Source]:
  """Maps every parameter path of the model to the tensors that hold it."""
  both = {"mlp_norm": BETWEEN} if config.norm_placement == "both" else {}
  experts = EXPERTS if config.num_experts else {}
  return parameters.table(
      config, NAMES | both | experts, "model.layers.{layer}.")


def model_config(data: Mapping[str, Any], path: Any) -> ModelConfig:
  """Reads the shape that a config.json describes; compute fields keep defaults.

  Args:
    data: config.json of a text model.
    path: names the file in errors.

  Raises:
    ValueError: the family is unknown, a size is missing, or a key asks for
      something that the model does not do.
  """
  name = data.get("model_type")
  if name not in FAMILIES:
    raise ValueError(
        f"{path} is of model_type {name!r}; this reader knows "
        f"{', '.join(FAMILIES)}.")
  family = FAMILIES[name]
  _check_keys(data, family, path)
  # Null stands for "not set" in most keys, and then the default holds.
  data = dict(family.defaults) | {
      key: value for key, value in data.items()
      if value is not None or key in NULLABLE}
  missing = [key for key in SIZES.values() if key not in data]
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}.")
  try:
    return ModelConfig(**_fields(data, family))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


# Keys for which null is a value ("off"), and not the same as a missing key.
NULLABLE = ("sliding_window", "final_logit_softcapping",
            "attn_logit_softcapping")


def to_json(config: ModelConfig) -> dict[str, Any]:
  """Writes a model's config.json, for the first family that computes the same.

  It has no dtype and token ids. The result is read again and compared, so that
  no field gets lost.

  Raises:
    ValueError: no family computes it; names the fields that the nearest family
      lacks.
  """
  wanted = parameters.comparable(config)
  nearest: dict[str, Any] = {}
  for name, family in FAMILIES.items():
    data = _written(name, family, config)
    try:
      found = parameters.comparable(model_config(data, "config.json"))
    except ValueError:
      continue  # The family has no keys for it.
    lost = {f"{field}={value}": name for field, value in wanted.items()
            if value != found[field]}
    if not lost:
      return data
    nearest = min(nearest or lost, lost, key=len)
  raise ValueError(
      "no family of transformers that is known here computes this model; the "
      f"nearest, {next(iter(nearest.values()))}, does not have "
      f"{', '.join(nearest)}. Known are {', '.join(FAMILIES)}.")


def _written(
    name: str, family: Family, config: ModelConfig) -> dict[str, Any]:
  """Writes the config.json that describes a model best within a family."""
  c, kinds = config, config.layer_kinds
  own = {
      "use_sliding_window": "local" in kinds,
      "sliding_window": c.sliding_window or None,
      "layer_types": [KINDS.get(kind, KINDS["global"]) for kind in kinds],
      "no_rope_layers": [int(kind != "nope") for kind in kinds],
      "query_pre_attn_scalar": _whole(c.attention_scale**-2),
      "attn_logit_softcapping": c.attention_softcap or None,
      "final_logit_softcapping": c.final_softcap or None,
      "rope_local_base_freq": c.rope_local_theta or c.rope_theta,
      "decoder_sparse_step": 1, "mlp_only_layers": [],
      **{key: getattr(c, field) for field, key in MOE.items()}}
  if "use_sliding_window" in family.keys:
    own["max_window_layers"] = (
        kinds.index("local") if "local" in kinds else c.layers)
  data = {
      "model_type": name, "architectures": [family.architecture],
      **{key: getattr(c, field) for field, key in SIZES.items()},
      "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
      family.activation: ACTIVATIONS[c.activation],
      "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied_embeddings,
      "rope_theta": c.rope_theta,
      "rope_scaling": c.rope_scaling and {
          "rope_type": c.rope_scaling.kind, **{
              key: getattr(c.rope_scaling, field)
              for field, key in SCALINGS[c.rope_scaling.kind].items()}}}
  if "num_experts" in family.keys:
    # The width of dense layers, which there are none of; as in the releases.
    data["intermediate_size"] = c.mlp * c.experts_per_token
  if c.max_positions:
    data["max_position_embeddings"] = c.max_positions
  return data | {key: own[key] for key in family.keys if key in own}


def _whole(value: float) -> float:
  """Rounds a number that is whole up to rounding errors."""
  return round(value) if abs(value - round(value)) < 1e-9 * value else value


def _check_keys(data: Mapping[str, Any], family: Family, path: Any) -> None:
  known = {
      *INERT, *SIZES.values(), *family.keys, family.activation, "head_dim",
      "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
      "rope_theta", "rope_scaling", "rope_parameters",
      "max_position_embeddings"}
  if family.activation != "hidden_act":
    known.add("hidden_act")  # transformers reads the other one.
  unknown = {key: value for key, value in data.items()
             if value and key not in known and not key.startswith("_")}
  if unknown:
    raise ValueError(
        f"{path} has what this reader does not know, and what may change the "
        f"computation: {unknown}. If it does not, take it out of the file.")


def _fields(data: Mapping[str, Any], family: Family) -> dict[str, Any]:
  fields = dict(family.fields) | {
      field: data[key] for field, key in SIZES.items()}
  fields["kv_heads"] = data.get("num_key_value_heads", fields["heads"])
  fields["head_dim"] = data.get(
      "head_dim", fields["embed"] // fields["heads"])
  fields["max_positions"] = data.get("max_position_embeddings", 0)
  fields["norm_eps"] = data.get("rms_norm_eps", 1e-6)
  fields["tied_embeddings"] = data.get("tie_word_embeddings", False)
  fields["activation"] = _one_of(
      data.get(family.activation, "silu"), ACTIVATIONS, family.activation)
  if "query_pre_attn_scalar" in family.keys:
    width = data["query_pre_attn_scalar"]
    if width != fields["head_dim"]:
      fields["query_scale"] = width**-0.5
    fields["attention_softcap"] = data.get("attn_logit_softcapping") or 0.0
    fields["final_softcap"] = data.get("final_logit_softcapping") or 0.0
  kinds = _kinds(data, family, fields["layers"])
  fields["layer_pattern"] = _shortest(kinds)
  if "num_experts" in family.keys:
    fields |= _experts(data)
  if "local" in kinds:
    fields["sliding_window"] = data.get("sliding_window") or 0
  return fields | _rope(data, family, "local" in kinds)


def _experts(data: Mapping[str, Any]) -> dict[str, Any]:
  """Reads the fields of experts; all layers have the same number and width."""
  data = {"num_experts": data.get("num_local_experts"), **data}
  if data["decoder_sparse_step"] != 1 or data.get("mlp_only_layers"):
    raise ValueError(
        "decoder_sparse_step and mlp_only_layers ask for layers without "
        "experts among layers that have them, which is not known here.")
  missing = [key for key in MOE.values() if data.get(key) is None]
  if missing:
    raise ValueError(f"it lacks {', '.join(missing)}.")
  return {field: data[key] for field, key in MOE.items()}


def _one_of(value: Any, known: Mapping[str, str], key: str) -> str:
  """Translates a value to our name of it."""
  for ours, theirs in known.items():
    if value == theirs:
      return ours
  raise ValueError(
      f"{key}={value!r} is not known here; {', '.join(known.values())} are.")


def _kinds(
    data: Mapping[str, Any], family: Family, layers: int) -> list[str]:
  """Lists the kind of every layer, by the keys that the family has for it."""
  given = [_one_of(kind, KINDS, "layer_types")
           for kind in data.get("layer_types") or ()]
  numbers = range(layers)
  if "no_rope_layers" in family.keys:
    interval = data["no_rope_layer_interval"]
    flags = data.get("no_rope_layers") or [
        (i + 1) % interval for i in numbers]
    if "local" in given:
      raise ValueError("layer_types has layers with a sliding window, which "
                       "are not known in this family.")
    found = ["global" if flag else "nope" for flag in flags]
  elif given:
    found = given
  elif "sliding_window" not in family.keys or data["sliding_window"] is None:
    found = ["global"] * layers
  elif family.period:
    period = data.get("sliding_window_pattern", family.period)
    found = ["local" if (i + 1) % period else "global" for i in numbers]
  elif "use_sliding_window" in family.keys:
    first = (data["max_window_layers"] if data.get("use_sliding_window")
             else layers)
    found = ["local" if i >= first else "global" for i in numbers]
  else:
    found = ["local"] * layers
  if len(found) != layers:
    raise ValueError(
        f"{len(found)} kinds of layers are given for {layers} layers.")
  return found


def _shortest(kinds: list[str]) -> tuple[str, ...]:
  """Finds the shortest pattern that repeats to `kinds`."""
  return next(
      tuple(kinds[:n]) for n in range(1, len(kinds) + 1)
      if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def _rope(
    data: Mapping[str, Any], family: Family, local: bool) -> dict[str, Any]:
  """Reads rope_theta, rope_local_theta and rope_scaling."""
  if data.get("rope_parameters") and data.get("rope_scaling"):
    raise ValueError("rope_parameters and rope_scaling are both set; keep the "
                     "one that is meant.")
  found = data.get("rope_parameters") or data.get("rope_scaling") or {}
  by_kind = {ours: found[theirs] for ours, theirs in KINDS.items()
             if found.get(theirs)}
  theta = data.get("rope_theta", 10_000.0)
  rope = dict(by_kind.get("global", {} if by_kind else found))
  fields: dict[str, Any] = dict(rope_theta=float(
      rope.pop("rope_theta", theta)))
  scaling = _scaling(rope)
  if scaling is not None:
    fields["rope_scaling"] = scaling
  if "rope_local_base_freq" not in family.keys:
    if "local" in by_kind:
      raise ValueError("rope_parameters of sliding_attention are not known in "
                       "this family.")
    return fields
  narrow = dict(by_kind.get("local", {}))
  theta = narrow.pop("rope_theta", data["rope_local_base_freq"])
  if _scaling(narrow) is not None:
    raise ValueError(f"rope_parameters.sliding_attention={narrow} has a "
                     "scaling, which only layers of full attention have here.")
  if local:
    fields["rope_local_theta"] = float(theta)
  return fields


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
  """Reads the scaling of rope_parameters or rope_scaling, without its theta."""
  rope = dict(rope)
  old = rope.pop("type", "default")
  kind = rope.pop("rope_type", old)
  if rope.pop("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor is not 1, and the model turns "
                     "whole heads.")
  keys = {} if kind == "default" else SCALINGS.get(kind)
  if keys is None or rope.keys() != set(keys.values()):
    raise ValueError(
        f"RoPE of the type {kind!r} with {rope} is not known here; 'default' "
        f"and {SCALINGS} are.")
  if kind == "default":
    return None
  values: dict[str, Any] = {
      field: rope[key] if field == "original_context" else float(rope[key])
      for field, key in keys.items()}
  return RopeScaling(kind=kind, **values)
