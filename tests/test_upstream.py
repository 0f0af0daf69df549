"""Private names of other libraries that this package uses, what for, and what it relies on.

A release that moves one of them fails here, by name. `test_the_list_is_complete` finds names that are used and not
listed, and names that are listed and not used any more.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import hf_rskip

ROOT = Path(hf_rskip.__file__).parent

PRIVATE = [
    # owner, name, parameters that we pass or override (None: not a function), what breaks without it
    ("transformers:PreTrainedModel", "_can_compile_fullgraph", None, "`generate` does not compile static caches"),
    ("transformers:PreTrainedModel", "_can_record_outputs", None, "`output_attentions` and `output_hidden_states`"),
    ("transformers:PreTrainedModel", "_init_weights", ("module",), "models are initialised with other numbers"),
    ("transformers:PreTrainedModel", "_no_split_modules", None, "layers are split by `device_map` and FSDP"),
    ("transformers:PreTrainedModel", "_skip_keys_device_placement", None, "caches are moved by `device_map`"),
    ("transformers:PreTrainedModel", "_supports_flash_attn", None, "flash attention is refused"),
    ("transformers:PreTrainedModel", "_supports_flex_attn", None, "flex attention is refused"),
    ("transformers:PreTrainedModel", "_supports_sdpa", None, "sdpa attention is refused"),
    ("transformers:PreTrainedModel", "_tied_weights_keys", None, "embeddings are not tied"),
    ("transformers:PreTrainedModel", "_tp_plan", None, "tensor parallelism has no plan"),
    ("transformers:PreTrainedModel", "_keys_to_ignore_on_save", None, "the Trainer warns of tied weights as missing"),
    (
        "transformers:PreTrainedModel",
        "_get_resized_embeddings",
        ("old_embeddings", "new_num_tokens"),
        "`resize_token_embeddings` of a model with separate embeddings",
    ),
    ("transformers:PreTrainedConfig", "_attn_implementation", None, "which attention function a layer calls"),
    ("transformers:GenerationConfig", "_from_model_config", None, "`max_len_a` and others are lost in a checkpoint"),
    ("transformers:Trainer", "_get_grad_norm", ("model", "grad_norm"), "the loss guard, before an update"),
    ("transformers:Trainer", "_get_train_sampler", ("train_dataset",), "batches of translation by token budget"),
    ("transformers:Trainer", "_save_checkpoint", ("model", "trial"), "a checkpoint is complete or not there"),
    ("evaluate:EvaluationModule", "_compute", (), "the metric of this package"),
    ("evaluate:EvaluationModule", "_info", (), "the metric of this package"),
    ("sacrebleu.metrics:BLEU", "_compute_score_from_stats", ("stats",), "scores of bootstrap resamples"),
    ("sacrebleu.metrics:BLEU", "_extract_corpus_statistics", ("hypotheses", "references"), "the same scores"),
    ("sacrebleu.metrics:CHRF", "_compute_score_from_stats", ("stats",), "scores of bootstrap resamples"),
    ("sacrebleu.metrics:CHRF", "_extract_corpus_statistics", ("hypotheses", "references"), "the same scores"),
    ("torch:Tensor", "_base", None, "the probe finds no gradient of the feature maps behind a view"),
    ("torch:Tensor", "_is_view", None, "the probe finds no gradient of the feature maps behind a view"),
    ("torch.autograd:forward_ad", "_current_level", None, "kernels are called in forward-mode differentiation"),
    ("torch:_C", "_are_functorch_transforms_active", (), "kernels are called under `torch.func`"),
    ("torch.nn:Linear", "_backward_hooks", None, "kernels take the place of a norm that hooks watch"),
    ("torch.nn:Linear", "_backward_pre_hooks", None, "kernels take the place of a norm that hooks watch"),
    ("torch.nn:Linear", "_forward_hooks", None, "kernels take the place of a norm that hooks watch"),
    ("torch.nn:Linear", "_forward_pre_hooks", None, "kernels take the place of a norm that hooks watch"),
    ("torch.nn.modules:module", "_has_any_global_hook", (), "kernels take the place of a norm that hooks watch"),
]
NOT_OURS = {"_C"}
"""Modules on the way to a listed name."""


def find_owner(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def check(path, name, parameters, breaks):
    """Raises an `AssertionError` that says what breaks, if the name is gone or takes other arguments."""
    owner = find_owner(path)
    made = (
        owner()
        if name in ("_attn_implementation", "_from_model_config")
        else owner(1, 1)
        if path == "torch.nn:Linear"
        else owner
    )
    assert hasattr(made, name), f"{path.replace(':', '.')} has no {name} any more. It is used for: {breaks}"
    if parameters:
        known = inspect.signature(getattr(owner, name)).parameters
        missing = [parameter for parameter in parameters if parameter not in known]
        assert not missing, f"{path.replace(':', '.')}.{name} takes no {missing[0]} any more. It is used for: {breaks}"


@pytest.mark.parametrize("entry", PRIVATE, ids=lambda entry: entry[1])
def test_private_names(entry):
    check(*entry)


def test_a_name_that_is_gone_is_said():
    with pytest.raises(AssertionError, match="transformers.Trainer has no _save_chekpoint any more.*complete or not"):
        check("transformers:Trainer", "_save_chekpoint", None, "a checkpoint is complete or not there")
    with pytest.raises(AssertionError, match="_save_checkpoint takes no folder any more"):
        check("transformers:Trainer", "_save_checkpoint", ("folder",), "a checkpoint is complete or not there")


def package_modules():
    for info in pkgutil.walk_packages([str(ROOT)], "hf_rskip."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def overridden_names():
    """Private attributes of the classes here that a base class of another library has, too."""
    found = set()
    for module in package_modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                ours = [base for base in cls.__mro__ if base.__module__.startswith("hf_rskip")]
                theirs = [base for base in cls.__mro__ if base not in ours]
                names = {name for base in ours for name in vars(base) if is_private(name)}
                found |= {name for name in names if any(name in vars(base) for base in theirs)}
    return found - {"_abc_impl", "_backward_cls"}  # made by Python and by torch


def accessed_names():
    """Private attributes that are read and that nothing here defines, with the private imports."""
    defined, accessed = set(), set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                accessed.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                accessed |= {alias.name for alias in node.names if is_private(alias.name)}
    return accessed - defined


def test_the_list_is_complete():
    listed = {name for _, name, *_ in PRIVATE if is_private(name)}
    used = (overridden_names() | accessed_names()) - NOT_OURS
    assert used <= listed, f"private names that are not listed: {sorted(used - listed)}"
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    assert [name for name in listed if name not in text] == []


def upstream_imports():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    yield path.relative_to(ROOT), node.module, alias.name


def test_every_imported_name_exists():
    """Also those that are imported inside functions, where a release that moves one would show only at their call."""
    optional = {"tensorboard", "onnxruntime", "onnx_ir", "onnx"}
    for path, module, name in upstream_imports():
        if module.split(".")[0] not in optional:
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.import_module(f"{module}.{name}"), f"{path}: {module}.{name}"
