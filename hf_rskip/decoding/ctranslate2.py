"""Translates and scores with CTranslate2 what `hf-rskip export --format ctranslate2` wrote."""

import copy
import json
from itertools import groupby
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from ..errors import UserError, first_line, require
from ..models.generation_rskip import GNMTLengthPenalty, check_options, find_options, length_limits

logger = logging.get_logger(__name__)

_SAME = {"num_beams", "num_return_sequences", "length_penalty", "gnmt_length_penalty", "early_stopping", "use_cache"}
_SAME |= {"max_new_tokens", "max_length", "max_len_a", "max_len_b"}
_SAME |= {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version"}
"""Options of `generate` that have the same effect here, or none in either."""
_NEUTRAL = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "min_new_tokens": 0}


class CTranslate2Model:
    """A model in CTranslate2 with the calls that [`translate`] and [`score_tokens`] make.

    Its beam search is that of Transformers with `early_stopping` true: a sentence ends once it has `num_beams`
    hypotheses that have ended. It runs on the GPU if there is one, else on as many threads as torch.

    Args:
        folder: an exported one.

    Raises:
        [`UserError`]: if ctranslate2 is missing, or cannot load the model.
    """

    device = torch.device("cpu")
    """Device of its input and output tensors."""

    def __init__(self, folder: str):
        ctranslate2 = require("ctranslate2", "ctranslate2")
        try:
            self.config = AutoConfig.from_pretrained(folder)
            self.generation_config = GenerationConfig.from_pretrained(folder)
            self.translator = ctranslate2.Translator(folder, device="auto", intra_threads=torch.get_num_threads())
            self.source_tokens, self.target_tokens = (_read_vocabulary(folder, side) for side in ("source", "target"))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder!r} is not a complete export to CTranslate2: {first_line(error)}") from error
        self.target_ids = {token: index for index, token in enumerate(self.target_tokens)}

    def eval(self) -> "CTranslate2Model":
        return self

    def generate(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, custom_generate=None, **kwargs
    ) -> torch.LongTensor:
        """Searches as `generate` of a model in torch does.

        Args:
            input_ids, attention_mask: source tokens, and 1 at the real ones, `(sentences, length)`.
            custom_generate: ignored; the search in torch, in place of which this one stands.
            kwargs: options of `generate`, over the generation configuration.

        Returns:
            The start token and those of the translations, padded, `(sentences * num_return_sequences, length)`.

        Raises:
            [`UserError`]: if an option would have another effect than in torch, or a source has no token but the end.
            `ValueError`: if an option is wrong.
        """
        options = find_options(kwargs, self.generation_config)
        beams, penalty = options.get("num_beams", 1), options.get("length_penalty", 1.0)
        self._check(kwargs, options)
        ends = options.get("eos_token_id")
        sources = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        if any({self.config.bos_token_id, self.config.eos_token_id}.issuperset(source) for source in sources):
            raise UserError("CTranslate2 translates no sentence without a token of its own")
        limits = self._limits([len(source) for source in sources], options)
        hypotheses = [None] * len(sources)
        for limit, group in groupby(sorted(range(len(sources)), key=limits.__getitem__), limits.__getitem__):
            group = list(group)
            results = self.translator.translate_batch(
                [[self.source_tokens[token] for token in sources[index]] for index in group],
                beam_size=beams,
                num_hypotheses=options.get("num_return_sequences", 1),
                length_penalty=penalty or 1e-9,  # 0 would end a sentence at its first hypothesis
                max_decoding_length=limit,
                min_decoding_length=0,  # not 1: the end token may come first
                max_input_length=0,
                end_token=ends if isinstance(ends, list) else [ends],
                return_end_token=True,  # so that the length counts it
            )
            for index, result in zip(group, results, strict=True):
                hypotheses[index] = result.hypotheses
        start = self.config.decoder_start_token_id
        rows = [[start, *map(self.target_ids.get, tokens)] for several in hypotheses for tokens in several]
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=self.config.pad_token_id)

    def score_tokens(self, sources: list[list[int]], targets: list[list[int]]) -> list[list[float]]:
        """The log-probability of every token of targets that end with the end token, or before it."""
        end = self.target_ids[self.config.eos_token]
        texts = [target[:-1] if target[-1] == end else target for target in targets]
        results = self.translator.score_batch(
            [[self.source_tokens[token] for token in source] for source in sources],
            [[self.target_tokens[token] for token in text] for text in texts],
            max_input_length=0,
        )
        return [result.log_probs[: len(target)] for result, target in zip(results, targets, strict=True)]

    def _check(self, kwargs: dict, options: dict) -> None:
        """Raises a [`UserError`] that names an option of another effect, or the `ValueError` of a wrong one."""
        check_options(options, kwargs, self.config.max_position_embeddings)
        copy.deepcopy(self.generation_config).update(**kwargs)  # validates the options
        for name in ("decoder_start_token_id", "pad_token_id"):
            own = getattr(self.config, name)
            if options.get(name, own) != own:
                raise UserError(f"`{name}` is {own} in the exported model, not {options[name]!r}")
        for name, value in {**self.generation_config.to_diff_dict(), **kwargs}.items():
            is_off = value is None or value is False or _NEUTRAL.get(name) == value
            if name not in _SAME and not name.startswith("_") and not is_off:
                raise UserError(f"`{name}` {value!r} has no counterpart in CTranslate2")
        if options.get("num_beams", 1) <= 1:
            return
        if isinstance(options.get("length_penalty"), GNMTLengthPenalty):
            raise UserError("`gnmt_length_penalty` does not exist in CTranslate2: give a `length_penalty`")
        early = options.get("early_stopping")
        if early is None:
            logger.warning_once("`early_stopping` is true in CTranslate2, and false by default in torch")
        elif early is not True:
            raise UserError(f"`early_stopping` is always true in CTranslate2, not {early!r}")

    def _limits(self, lengths: list[int], options: dict) -> list[int]:
        """The largest number of new tokens of each sentence; `lengths` are those of the sources."""
        a, b, most = (options.get(name) for name in ("max_len_a", "max_len_b", "max_new_tokens"))
        positions = self.config.max_position_embeddings
        if most is None and a is None and b is None:
            most = options.get("max_length", 21) - 1  # counts the start token; 21 is the default of Transformers
        most = min(most or positions, positions)
        if a is None and b is None:
            return [most] * len(lengths)
        return length_limits(torch.tensor(lengths), a, b, most).tolist()


def _read_vocabulary(folder: str, side: str) -> list[str]:
    """The tokens of one side, in the order of their ids."""
    shared, own = (Path(folder, f"{name}_vocabulary.json") for name in ("shared", side))
    return json.loads((shared if shared.exists() else own).read_text(encoding="utf-8"))
