"""Random MarianMT models, in memory and as folders with a tokenizer."""

import io
import json

import pytest
import torch
from plain_transformers import TINY, shake
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

# As the models of Helsinki-NLP have it: one id for padding and the start, which is never to be generated.
GENERATION = {"bad_words_ids": [[0]], "num_beams": 4, "max_length": 12, "renormalize_logits": True}


@pytest.fixture(scope="session")
def make_marian():
    def make_marian(seed=0, bias=True, **values) -> MarianMTModel:
        """A model none of whose parameters are at their initial values, in evaluation mode."""
        tiny = TINY | {
            "activation_function": "swish",
            "scale_embedding": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "forced_eos_token_id": 1,
        }
        torch.manual_seed(seed)
        model = shake(MarianMTModel(MarianConfig(**(tiny | values))))
        if bias:
            model.final_logits_bias.normal_()
        model.generation_config.update(**GENERATION)
        return model

    return make_marian


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Sources of lengths 7, 4 and 2, padded, and targets of lengths 5, 6 and 3."""
    torch.manual_seed(1)
    mask = (torch.arange(7) < torch.tensor([7, 4, 2])[:, None]).long()
    source = torch.randint(2, 30, mask.shape) * mask
    target = torch.randint(2, 30, (3, 6)).masked_fill(torch.arange(6) >= torch.tensor([5, 6, 3])[:, None], 0)
    target[:, 0] = 0
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


@pytest.fixture(scope="session")
def marian_tokenizer(pairs, tmp_path_factory) -> MarianTokenizer:
    """A tokenizer of the tiny corpus with two sentencepiece models and one vocabulary, padding last as in Marian."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    pieces = []
    for side, name in (("en", "source.spm"), ("de", "target.spm")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pair[side] for pair in pairs["train"]),
            model_writer=model,
            vocab_size=50,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / name).write_bytes(model.getvalue())
        trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces += [trained.id_to_piece(index) for index in range(3, len(trained))]
    words = dict.fromkeys(["</s>", "<unk>", *pieces, "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(words)}))
    return MarianTokenizer(
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        vocab=str(folder / "vocab.json"),
        source_lang="en",
        target_lang="de",
    )


@pytest.fixture(scope="session")
def marian_folder(make_marian, marian_tokenizer, tmp_path_factory):
    """A checkpoint as Helsinki-NLP's are, with its tokenizer."""
    pad = marian_tokenizer.pad_token_id
    model = make_marian(
        vocab_size=len(marian_tokenizer),
        max_position_embeddings=128,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=marian_tokenizer.eos_token_id,
        forced_eos_token_id=marian_tokenizer.eos_token_id,
    )
    model.generation_config.bad_words_ids = [[pad]]
    folder = tmp_path_factory.mktemp("marian")
    model.save_pretrained(folder)
    marian_tokenizer.save_pretrained(folder)
    return folder
