"""Keys of a parallel corpus, checked before any data is read."""

from dataclasses import dataclass
from pathlib import PurePath

from transformers.hf_argparser import HfArg

from ...errors import UserError
from ..arguments import DatasetArguments


@dataclass
class DataArguments(DatasetArguments):
    """The parallel corpus and how to prepare it, for [`transformers.HfArgumentParser`].

    The corpus is either one dataset (`dataset_name`) or pairs of plain-text files (`train_files`, `validation_files`,
    `test_files`). Lengths are counted in tokens and include the closing `</s>`.

    Raises:
        UserError: if a value is not allowed; the message names the field and what is allowed.
    """

    dataset_name: str | None = HfArg(
        default=None, help="Hub id or local folder of a dataset with a `translation` column, or `cldr`."
    )
    source_lang: str | None = HfArg(default=None, help="Code of the language translated from.")
    target_lang: str | None = HfArg(default=None, help="Code of the language translated into.")
    train_files: list[str] | None = HfArg(
        default=None, help="Two UTF-8 text files for training, source then target, one sentence a line."
    )
    validation_files: list[str] | None = HfArg(
        default=None, help="Two UTF-8 text files for validation, source then target."
    )
    test_files: list[str] | None = HfArg(default=None, help="Two UTF-8 text files for the test, source then target.")
    validation_split: str | None = HfArg(
        default=None, help="Name of its validation split; validation unless there is a validation_size."
    )
    max_characters: int = HfArg(
        default=10_000, help="Drop training pairs with a side of more characters, before tokenization."
    )
    remove_duplicates: bool = HfArg(default=False, help="Drop training pairs whose source and target both came before.")
    max_source_length: int = HfArg(default=256, help="Drop training pairs whose source has more tokens than this.")
    max_target_length: int = HfArg(default=256, help="Drop training pairs whose target has more tokens than this.")
    max_length_ratio: float | None = HfArg(
        default=None, help="Drop training pairs whose longer side has more than this many times the other's tokens."
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="Folder, Hub id or file of the package `tokenizers` of an existing tokenizer; without it one is trained.",
    )
    tokenizer_train_samples: int = HfArg(
        default=1_000_000, help="Train the tokenizer on at most so many pairs, taken at even distances from the corpus."
    )
    lowercase: bool = HfArg(
        default=False, help="Lower-case all text, in the normalizer of the tokenizer that is trained."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("source_lang", "target_lang"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise UserError(f"{name} must be a language code such as 'en', not {value!r}.")
            if code := _code_of(value):
                raise UserError(f"{name} must be the language's code, {code!r}, not its name {value!r}.")
        if self.source_lang == self.target_lang:
            raise UserError(f"source_lang and target_lang must differ, but both are {self.source_lang!r}.")

        given = [name for name in ("train_files", "validation_files", "test_files") if getattr(self, name) is not None]
        if self.dataset_name is None and not given:
            raise UserError("No corpus is named: set dataset_name or train_files (source file, then target file).")
        if self.dataset_name is not None and given:
            raise UserError(f"dataset_name and {given[0]} are both set: give one or the other.")
        for name in given:
            self._check_files(name)
        for name in ("dataset_config_name", "train_split", "validation_split", "test_split"):
            is_said = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if is_said and (given or self.dataset_name == "cldr" and name == "dataset_config_name"):
                raise UserError(
                    f"{name} has no effect with {given[0] if given else 'dataset_name cldr'}: leave it out."
                )
        if self.dataset_name is not None and self.validation_size is None and self.validation_split is None:
            self.validation_split = "validation"

        if self.lowercase and self.tokenizer_name is not None:
            raise UserError("lowercase shapes a tokenizer that is trained, so it cannot be set with tokenizer_name.")

    def _check_files(self, name: str):
        files = getattr(self, name)
        if not isinstance(files, (list, tuple)) or len(files) != 2:
            raise UserError(f"{name} must be exactly two files, source then target, not {files!r}.")
        # The suffixes are the only hint at a wrong direction, which no later step could notice.
        first, second = (PurePath(file).suffixes for file in files)
        source, target = f".{self.source_lang}", f".{self.target_lang}"
        if target in first and source not in first and source in second and target not in second:
            raise UserError(
                f"{name} must be the {self.source_lang} file, then the {self.target_lang} file, but they are named "
                f"the other way round: {files[0]}, {files[1]}."
            )


def _code_of(name: str) -> str | None:
    """Returns the code of a language by its English name, in any case; `None` if there is no such language."""
    if len(name) <= 3:  # it is a code already
        return None
    from babel import Locale  # its tables take long to load

    names = Locale("en").languages
    return next((code for code, language in names.items() if language.casefold() == name.casefold()), None)
