"""The parser of `hf-rskip`, and what a user sees of errors."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], None]
    """Takes the parsed arguments and the words that the parser does not know."""


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="flat YAML of training keys")
    launcher = parser.add_argument_group("several processes (as `accelerate launch`; given by it or by the profile)")
    launcher.add_argument(
        "--accelerate_config", metavar="PROFILE", help="ddp, fsdp2, cpu, multi-node, or a YAML of `accelerate config`"
    )
    launcher.add_argument("--num_processes", type=_count, metavar="N", help="of all machines together")
    launcher.add_argument("--num_machines", type=_count, metavar="N")
    launcher.add_argument("--machine_rank", type=int, metavar="R", help="of this machine, from 0")
    launcher.add_argument("--main_process_ip", metavar="IP", help="address of the machine of rank 0")
    launcher.add_argument("--main_process_port", type=int, metavar="PORT")
    parser.usage = "hf-rskip train CONFIG.yaml [--accelerate_config PROFILE --num_processes N] [--key value ...]"
    parser.epilog = (
        "Keys on the command line override those of the file. `hf-rskip keys` prints them all with their defaults, "
        "`hf-rskip keys image-classification` those of the other task."
    )


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    if args.accelerate_config is None:
        from .train import train
    else:
        from .launch import launch as train

    train(args, rest)


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY.yaml", help="recipe, forms, seeds, grid, output_dir, ...")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="cells at once (default: 1)")
    parser.add_argument("--output_dir", help="in place of that of the file")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--cell", type=_count, metavar="N", help="run this cell alone, and report nothing")
    action.add_argument("--list", action="store_true", help="print number, state and command of every cell")
    action.add_argument("--report", action="store_true", help="run nothing: report what is there")
    parser.usage = "hf-rskip study STUDY.yaml [--jobs N | --cell N | --list | --report] [--key value ...]"
    parser.epilog = (
        "Other keys override those of the recipe in all cells, and are to be the same at every start. What has been "
        "run is not run again. On a cluster, give "
        "each cell to a job of its own, `sbatch --array=1-60 --wrap 'hf-rskip study STUDY.yaml --cell "
        "$SLURM_ARRAY_TASK_ID'`, or `seq 60 | xargs -P 4 -I{} hf-rskip study STUDY.yaml --cell {}`, and gather by "
        "`hf-rskip study STUDY.yaml --report`."
    )


def _study(args: argparse.Namespace, rest: list[str]) -> None:
    from .study import study

    study(args, rest)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {word!r}")
    return int(word)


def _add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a trained model")


def _add_generation_arguments(parser: argparse.ArgumentParser, ensemble: bool = True) -> None:
    group = parser.add_argument_group("generation (default: the model's own)")
    group.add_argument("--num_beams", type=_count)
    penalty = group.add_mutually_exclusive_group()
    penalty.add_argument("--length_penalty", type=float, help="scores are divided by length ** this")
    penalty.add_argument(
        "--gnmt_length_penalty", type=float, metavar="ALPHA", help="by ((5 + length) / 6) ** ALPHA instead"
    )
    group.add_argument("--max_new_tokens", type=_count)
    group.add_argument("--max_len_a", type=float, metavar="A", help="n tokens get at most A * n + B tokens")
    group.add_argument("--max_len_b", type=int, metavar="B")
    if ensemble:
        group.add_argument(
            "--ensemble", nargs="+", default=[], metavar="MODEL", help="average probabilities with these models'"
        )
    parser.add_argument(
        "--max_batch_tokens",
        type=_count,
        default=4096,
        help="padded source tokens times beams a batch (default: 4096)",
    )


def _add_test_set_arguments(parser: argparse.ArgumentParser, or_images: str = "") -> None:
    _add_split_arguments(parser, parser.add_mutually_exclusive_group(required=True), or_images)
    parser.add_argument("--max_samples", type=_count, help=f"only the first so many sentences{or_images}")
    parser.add_argument("--bleu_tokenize", help="sacreBLEU's `tokenize` (default: that of the target language)")


def _add_split_arguments(parser: argparse.ArgumentParser, corpus, or_images: str) -> None:
    corpus.add_argument("--dataset_name", help=f"Hub id or folder with a `translation` column{or_images}, or cldr")
    corpus.add_argument("--test_files", nargs=2, metavar=("SOURCE", "TARGET"), help="two UTF-8 text files")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--source_lang", help="default: that of the model's training")
    parser.add_argument("--target_lang", help="default: that of the model's training")
    parser.add_argument("--split", default="test", help="default: test")


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_column", help="of images (default: as in the model's training)")
    parser.add_argument("--label_column", help="of their classes (default: as in the model's training)")


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_argument(parser)
    _add_test_set_arguments(parser, " or images")
    _add_image_arguments(parser)
    parser.add_argument("--batch_size", type=_count, help="images at once (default: 256)")
    parser.add_argument("--output_file", help="write the translations here, a line each")
    _add_generation_arguments(parser)
    parser.set_defaults(max_batch_tokens=None)  # which of the two counts depends on the model


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from .evaluate import evaluate

    evaluate(args)


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help="folder or Hub id of a trained model, or UTF-8 text file with a translation a line; the baseline first",
    )
    _add_test_set_arguments(parser)
    parser.add_argument(
        "--n_samples",
        type=_count,
        help="resamples, at least 100 (default: 1000 of the bootstrap, 10000 of the randomisation)",
    )
    parser.add_argument("--output_dir", help="write tables, sentences and a picture to this folder")
    parser.epilog = "The environment variable SACREBLEU_SEED (default: 12345) seeds the resamples."
    _add_generation_arguments(parser, ensemble=False)
    parser.set_defaults(max_batch_tokens=None)  # so that it is known whether it was said


def _compare(args: argparse.Namespace, rest: list[str]) -> None:
    from .compare import compare

    compare(args)


def _add_translate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_argument(parser)
    parser.add_argument("--input_file", help="UTF-8 text, a sentence a line (default: standard input)")
    parser.add_argument("--output_file", help="default: standard output")
    parser.add_argument(
        "--n_best", type=_count, metavar="N", help="N lines a sentence: `number ||| translation ||| score`"
    )
    _add_generation_arguments(parser)


def _translate(args: argparse.Namespace, rest: list[str]) -> None:
    from .translate import translate_lines

    translate_lines(args)


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_argument(parser)
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--dataset_name", help="Hub id or folder with a `translation` column, or cldr")
    corpus.add_argument("--source_file", help="UTF-8 text, a sentence a line; with --target_file")
    parser.add_argument("--target_file", help="its translations")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--source_lang", help="default: that of the model's training")
    parser.add_argument("--target_lang", help="default: that of the model's training")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--max_samples", type=_count, help="only the first so many sentences")
    parser.add_argument("--ensemble", nargs="+", default=[], metavar="MODEL", help="average probabilities with these")
    parser.add_argument("--per_token", action="store_true", help="add every token and its log-probability")
    parser.add_argument("--output_file", help="default: standard output")
    parser.add_argument("--max_batch_tokens", type=_count, default=4096, help="padded tokens a batch")


def _score(args: argparse.Namespace, rest: list[str]) -> None:
    from .score import score_translations

    score_translations(args)


def _add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_argument(parser)
    parser.add_argument("sentence", metavar="SENTENCE", help="in the source language")
    parser.add_argument("output_file", metavar="PICTURE", help="such as attention.png or attention.pdf")
    parser.add_argument("--translation", help="default: the model's own")


def _attention(args: argparse.Namespace, rest: list[str]) -> None:
    from .attention import attention

    attention(args)


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "systems",
        nargs="*",
        metavar="SYSTEM",
        help="folder or Hub id of a model, RECIPE.yaml for the model that it begins with, or an earlier probe.csv",
    )
    parser.add_argument("--run", nargs="+", default=[], metavar="FOLDER", help="every checkpoint of these trainings")
    _add_split_arguments(parser, corpus := parser.add_mutually_exclusive_group(), " or images")
    corpus.add_argument(
        "--random_data",
        nargs="?",
        type=_count,
        const=32,
        metavar="SIZE",
        help="random tokens, SIZE a sentence, or images of SIZE x SIZE (default: 32); no data is read",
    )
    _add_image_arguments(parser)
    parser.add_argument("--samples", type=_count, default=32, help="sentence pairs or images (default: 32)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of recipes (default: their own)")
    parser.add_argument(
        "--label_smoothing_factor", type=float, help="of the loss (default: a recipe's own, 0 of models)"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the systems, then of the runs, in table, CSV and pictures"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="write probe.csv and pictures to this folder")
    parser.usage = "hf-rskip probe [SYSTEM ...] [--run FOLDER ...] [options] [--key value ...]"
    parser.epilog = (
        "A recipe is probed on its own training split, a model on the data given. Other keys override recipes'. "
        "The summary has a row a stack: the gradient norm at its bottom over that at its top; the factor by which each "
        "sublayer changes it on the way down; the standard deviation of input x and output y over features; and "
        "medians over the sublayers of the angle between x and y and of the effective skip weight r, with which y, but "
        "for the gain of its norm, is parallel to r x + F(x). probe.csv has a row a sublayer; README.md explains its "
        "columns."
    )


def _probe(args: argparse.Namespace, rest: list[str]) -> None:
    from .probe import probe_systems

    probe_systems(args, rest)


def _add_keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TASK | WORD",
        help="translation (default) or image-classification, and a word of the keys to be printed (default: all)",
    )
    parser.usage = "hf-rskip keys [translation | image-classification] [WORD]"


def _keys(args: argparse.Namespace, rest: list[str]) -> None:
    from ..recipe.parsing import TASKS, describe_keys

    task = args.words.pop(0) if args.words and args.words[0] in TASKS else "translation"
    print(describe_keys(task, " ".join(args.words) or None))


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("architecture", choices=["marian", "resnet"], help="what SOURCE is")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or Hub id of a checkpoint; for resnet also a file with a state dict of torchvision or timm",
    )
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument(
        "--skip_recursions",
        type=int,
        help="K of marian; more than 1 is for fine-tuning (default: 1, the same output)",
    )


def _convert(args: argparse.Namespace, rest: list[str]) -> None:
    from .convert import convert

    convert(args)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_argument(parser)
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from .export import export

    export(args)


def _add_average_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUTPUT", help="new or empty folder")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="folders of models of one configuration")
    parser.add_argument("--run", metavar="FOLDER", help="output_dir of a training, in place of its checkpoints")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--last", type=_count, metavar="N", help="its last so many checkpoints")
    count.add_argument("--best", type=_count, metavar="N", help="those that it evaluated as best")


def _average(args: argparse.Namespace, rest: list[str]) -> None:
    from .average import average

    average(args)


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="`user/name`; created if there is none")
    parser.add_argument("--with-code", action="store_true", help="so that it loads where hf_rskip is not installed")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none (default: the main one)")
    parser.add_argument("--overwrite_card", action="store_true", help="replace an existing README.md on the Hub")


def _push(args: argparse.Namespace, rest: list[str]) -> None:
    from .push import push

    push(args)


def _env(args: argparse.Namespace, rest: list[str]) -> None:
    from .env import describe_environment

    print(describe_environment())


COMMANDS = {
    "train": Command("train a model from a recipe", _add_train_arguments, _train),
    "study": Command("train forms of a model with several seeds, and compare them", _add_study_arguments, _study),
    "evaluate": Command("score a model on a dataset: sacreBLEU, or accuracy", _add_evaluate_arguments, _evaluate),
    "compare": Command("test whether translations differ, by paired resampling", _add_compare_arguments, _compare),
    "translate": Command("translate lines of text", _add_translate_arguments, _translate),
    "score": Command("print the log-probabilities of given translations", _add_score_arguments, _score),
    "attention": Command("draw what a translation attends to", _add_attention_arguments, _attention),
    "probe": Command("measure what skip connections do, and draw it", _add_probe_arguments, _probe),
    "keys": Command("print the keys of a recipe with their defaults", _add_keys_arguments, _keys),
    "convert": Command("turn a MarianMT or ResNet checkpoint into one of ours", _add_convert_arguments, _convert),
    "export": Command("write a model as ONNX graphs", _add_export_arguments, _export),
    "average": Command("average checkpoints into one model", _add_average_arguments, _average),
    "push": Command("send a trained model to the Hugging Face Hub", _add_push_arguments, _push),
    "env": Command("print versions and devices, for a bug report", lambda parser: None, _env),
}


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-rskip", description="Transformers with recursive skip connections: train, evaluate, translate, share."
    )
    parser.add_argument("--version", action="version", version=f"hf-rskip {version('hf_rskip')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.add_argument(
            "--import_module",
            action="append",
            default=[],
            help="import this first (the current folder is searched last)",
        )
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-rskip`; returns its exit code: 0, or 2 after one sentence on standard error.

    Training that was stopped by SIGTERM returns 143, by Ctrl-C 130.
    """
    parser = _create_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "study", "probe"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_suggest(rest, args)}")
    from ..errors import Preempted

    try:
        if getattr(args, "accelerate_config", None) is None:  # else it is for the processes that are launched
            _start(args.import_module)
        COMMANDS[args.command].run(args, rest)
    except KeyboardInterrupt:
        if _is_first_to_end():
            print("hf-rskip: interrupted", file=sys.stderr)
        return 130
    except Preempted as stop:
        if _is_first_to_end():
            print(f"hf-rskip: {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        elif _is_first_to_end():
            print(f"hf-rskip: error: {_one_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _suggest(rest: list[str], args: argparse.Namespace) -> str:
    """The option that the first unknown word may have meant; those of the command are the names in `args`."""
    options = [f"--{name}" for name in vars(args)]
    close = difflib.get_close_matches(rest[0].split("=")[0], options, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _start(modules: list[str]) -> None:
    """What every command needs; not done at import, so that `--help` is quick."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    from .. import kernels  # noqa: F401  also registers the Auto classes; the package leaves it to the command line
    from ..own_modules import import_modules

    logging.disable_progress_bar()
    import_modules(modules)


def _is_first_to_end() -> bool:
    """Of the processes that torchrun started here to end early: what the others say is the same, or comes of it."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        Path(error_file).parents[1].joinpath("said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _one_sentence(error: Exception) -> str:
    from ..errors import UserError

    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return message
    return f"{type(error).__name__}: {message} (`--debug` shows where)"
