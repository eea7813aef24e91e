"""What mergekit computes in and writes, from `dtype`, `out_dtype` and the types of the inputs, and back."""

from __future__ import annotations

from collections.abc import Mapping

from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.errors import ConfigError
from search.grouping import LAYER
from search.mergekit.merge_file import MergeFile
from search.mergekit.methods import Method
from search.mergekit.models import Models
from search.mergekit.plan import Plan
from search.recipe import Recipe
from search.yaml_source import YamlSource

_WIDTH = {"F16": 0, "BF16": 0, "F32": 1, "F64": 2}


def output_dtype(file: MergeFile, method: Method, plan: Plan, models: Models, source: YamlSource) -> str | None:
    """The dtype that mergekit stores; None where it is that of the donor's tensors."""
    if file.out_dtype is not None:
        return file.out_dtype
    if file.dtype is not None:
        return "float32" if method.float32_out and file.dtype in ("bfloat16", "float16") else file.dtype
    made: dict[str, str] = {}
    for name, tensor in plan.tensors.items():
        specs = [models.tensors[model].get(read) for model, read in tensor.inputs.items()]
        dtypes = [spec.dtype for spec in specs if spec is not None]  # what a model lacks is refused later
        if dtypes and all(dtype in _WIDTH for dtype in dtypes):
            made[name] = _promoted(set(dtypes))
    if method.float32_out:
        made = {name: _promoted({dtype, "F32"}) for name, dtype in made.items()}
    if all(_kept_dtype(name, plan, models) == dtype for name, dtype in made.items()):
        return None
    if len(set(made.values())) > 1:
        types = ", ".join(sorted({*made.values()}))
        message = f"the models store tensors in several types, so mergekit writes {types} side by side; give out_dtype"
        raise ConfigError(source.fault(("merge_method",), message))
    return TORCH_NAMES[next(iter(made.values()))]


def _kept_dtype(name: str, plan: Plan, models: Models) -> str:
    """The dtype that a recipe without one gives a tensor: the donor's, or where it takes no part the first source's."""
    inputs = plan.tensors[name].inputs
    donor = models.donor
    if plan.layers is None or donor in inputs or not LAYER.match(name):
        return models.tensors[donor][inputs.get(donor, name)].dtype
    model, read = next(iter(inputs.items()))
    return models.tensors[model][read].dtype


def dtype_keys(
    recipe: Recipe,
    method: Method,
    dtypes: Mapping[str, Mapping[str, str]],
    kept: Mapping[str, str],
    reasons: list[str],
) -> dict[str, str]:
    """`dtype` and `out_dtype` that make mergekit compute in, and write, what the recipe says."""
    floats = {name: set(found.values()) for name, found in dtypes.items() if all(d in _WIDTH for d in found.values())}
    stored = set().union(*floats.values()) if floats else set()
    if any(dtype.startswith("F8") for found in dtypes.values() for dtype in found.values()):
        reasons.append("it merges no models in fp8")
    said: dict[str, str] = {} if recipe.input_dtype is None else {"dtype": recipe.input_dtype}
    computed = {name: recipe.input_dtype or TORCH_NAMES[_promoted(found)] for name, found in floats.items()}
    wanted = {name: recipe.dtype or TORCH_NAMES[kept[name]] for name in floats}
    # Where we compute in float32, mergekit must not in less; its linear and slerp do so too, and round once.
    narrow = [name for name, dtype in computed.items() if dtype in ("bfloat16", "float16")]
    if method.float32_inside:
        narrow = [name for name in narrow if wanted[name] != computed[name]]
    if recipe.compute == "float32" and narrow:
        if recipe.input_dtype is not None or "F64" in stored:
            reasons.append(f"it computes '{method.name}' in {computed[narrow[0]]} here, the recipe in float32")
        said["dtype"] = "float32"
        computed = dict.fromkeys(floats, "float32")
    if wanted == computed and not method.float32_out:
        return said
    outputs = sorted(set(wanted.values()))
    if len(outputs) == 1:
        return {**said, "out_dtype": outputs[0]}
    reasons.append(f"the output keeps several dtypes ({', '.join(outputs)}), of which it can write one")
    return said


def _promoted(found: set[str]) -> str:
    """What torch makes of several types."""
    if found == {"F16", "BF16"}:
        return "F32"
    return max(found, key=_WIDTH.__getitem__)
