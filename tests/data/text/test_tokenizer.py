"""The trained tokenizer: lossless, the same every time, deaf to control tokens in text, and free of this package."""

import json
import subprocess
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_rskip.data.names import is_path
from hf_rskip.data.text.tokenizer import check_known, load_tokenizer, train_tokenizer
from hf_rskip.errors import UserError

TEXTS = ["The dog sees the small house.", "Der Hund sieht das kleine Haus.", "A house, the house", "Größe über alles"]
PAD, BOS, EOS, UNK = range(4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 2, 320)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert tokenizer.pad_token_id == PAD and tokenizer.bos_token_id == BOS
    assert tokenizer.eos_token_id == EOS and tokenizer.unk_token_id == UNK
    assert tokenizer.padding_side == "right"
    assert not tokenizer.clean_up_tokenization_spaces


def test_every_sequence_ends_in_eos(tokenizer):
    house = tokenizer.convert_tokens_to_ids("Ġhouse")
    assert tokenizer("house").data == {"input_ids": [house, EOS], "attention_mask": [1, 1]}
    assert tokenizer(text_target="house").input_ids == [house, EOS]
    assert tokenizer("house", "house").input_ids == [house, EOS, house, EOS]
    assert tokenizer("").input_ids == [EOS]
    assert tokenizer(["house", ""], padding=True).input_ids == [[house, EOS], [EOS, PAD]]


def test_first_word_is_the_token_it_is_elsewhere(tokenizer):
    assert tokenizer("house the house").input_ids[0] == tokenizer("house the house").input_ids[-2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "house",
        " house",
        "   three  spaces   ",
        "\ttab\t\ttab \t",
        "line\nline\r\n",
        "Größe, weiße Füße, Ärger",
        "e\u0301 n\u0303",
        "\u0301combining first",
        "👩‍👩‍👧 🇩🇪 👍🏽",
        "\u2028\u00a0\u3000\x00\x85",
        "don't 's can't !? , .",
        "đại học",
        "ﬁ ½ Ⅷ",  # NFKC would change these
    ],
)
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert UNK not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)
    assert tokenizer.batch_decode([ids]) == [unicodedata.normalize("NFC", text) + "</s>"]


def test_lowercase_is_in_the_normalizer():
    tokenizer = train_tokenizer(TEXTS, 300, lowercase=True)
    assert tokenizer("ÜBER Hund").input_ids == tokenizer("über hund").input_ids
    assert tokenizer.decode(tokenizer("ÜBER Hund").input_ids, skip_special_tokens=True) == "über hund"


@pytest.mark.parametrize("text", ["a</s>b", "</s>", " <pad> <s><unk></s> "])
def test_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids.index(EOS) == len(ids) - 1
    assert not {PAD, BOS, UNK} & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text_target=[text]).input_ids == [ids]


def test_control_tokens_in_the_training_texts_make_no_subwords_of_that_name():
    tokenizer = train_tokenizer(["a </s> b <pad> c</s>"] * 50, 300)
    assert tokenizer("</s>").input_ids[:-1] and EOS not in tokenizer("</s>").input_ids[:-1]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("parallelism", ["false", "true"])
def test_the_same_texts_give_the_same_vocabulary(tokenizer, monkeypatch, parallelism):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    again = train_tokenizer(iter(TEXTS * 2), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_few_texts_give_a_smaller_vocabulary():
    tokenizer = train_tokenizer(["ab ab"], 1000)
    assert len(tokenizer) == 262  # 256 bytes, 4 special tokens, "ab" and " ab"


def test_the_vocabulary_must_hold_every_byte():
    assert len(train_tokenizer(TEXTS, 260)) == 260
    assert len(train_tokenizer(TEXTS, 270)) == 270
    with pytest.raises(UserError) as error:
        train_tokenizer(TEXTS, 259)
    assert str(error.value) == "vocab_size must be at least 260 (256 bytes and 4 special tokens), not 259."


SCRIPT = """
import json, sys
sys.modules["hf_rskip"] = None  # importing it raises ImportError
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
ids = tokenizer(texts).input_ids
print(json.dumps({
    "ids": ids,
    "decoded": tokenizer.batch_decode(ids, skip_special_tokens=True),
    "specials": [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
    "settings": [tokenizer.padding_side, tokenizer.clean_up_tokenization_spaces, tokenizer.model_max_length],
    "inputs": list(tokenizer(texts, padding=True)),
}))
"""


def test_the_saved_tokenizer_loads_without_this_package(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, model_max_length=512)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    # As in the folder of a trained model, whose type a plain Transformers does not know.
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    texts = ["Der Hund", "", "  two  spaces", "Füße 👍🏽</s>x<pad>"]
    command = [sys.executable, "-I", "-c", SCRIPT, str(folder), json.dumps(texts)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "ids": tokenizer(texts).input_ids,
        "decoded": texts,
        "specials": ["<pad>", "<s>", "</s>", "<unk>"],
        "settings": ["right", False, 512],
        "inputs": ["input_ids", "attention_mask"],
    }


def test_load_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("Der </s> Hund").input_ids == tokenizer("Der </s> Hund").input_ids


def test_tokenizers_that_cannot_be_used(tokenizer, tmp_path):
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert str(error.value) == f"There is no tokenizer {name!r}, neither in such a folder nor on the Hub."

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    for tokens, sentence in [
        (
            {"eos_token": "</s>"},
            "has no pad_token, which translation needs: `tokenizer.add_special_tokens({'pad_token': ...})`",
        ),
        (
            {"pad_token": "<pad>"},
            "has no eos_token, which translation needs: `tokenizer.add_special_tokens({'eos_token': ...})`",
        ),
        (
            {"pad_token": "<pad>", "eos_token": "</s>"},
            "does not end a sequence with its eos_token '</s>': set the `post_processor`",
        ),
    ]:
        PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(tmp_path)
        with pytest.raises(UserError) as error:
            load_tokenizer(str(tmp_path))
        assert str(error.value).startswith(f"The tokenizer {str(tmp_path)!r} {sentence}")


@pytest.mark.parametrize("name", ["{}/missing", "{}/missing.json", "no_such.json", "./missing", "a/b/c", "~/missing"])
def test_a_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: pytest.fail(f"asked for {name}"))
    name = name.format(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(name)
    assert str(error.value) == f"There is no tokenizer {name!r}: no such file or folder."


@pytest.mark.parametrize("name", ["gpt2", "user/name", "timm/resnet50.a1_in1k", "Qwen/Qwen2.5-0.5B"])
def test_what_may_be_an_id_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_path(name)
    (tmp_path / "user").mkdir()
    assert is_path("user/name")


def test_a_plain_bpe_file_gets_padding_and_an_end(tmp_path):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "bpe.json"))
    loaded = load_tokenizer(str(tmp_path / "bpe.json"))
    assert (loaded.pad_token, loaded.eos_token, loaded.unk_token, loaded.bos_token) == ("<pad>", "</s>", "<unk>", None)
    ids = loaded("the house").input_ids
    assert ids[-1] == loaded.eos_token_id and len(loaded) == size + 2
    assert loaded.decode(ids, skip_special_tokens=True) == "the house"
    assert loaded(text_target="the house").input_ids == ids
    loaded.save_pretrained(tmp_path / "folder")
    assert load_tokenizer(str(tmp_path / "folder"))("the house").input_ids == ids


def test_a_file_keeps_the_end_that_it_has(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded("the </s> house").input_ids == tokenizer("the </s> house").input_ids
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.bos_token == "<s>"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json' is not a file of the package `tokenizers`"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_that_knows_little_of_the_corpus(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "house": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    check_known(tokenizer, ["the house", "ein Haus"], "words.json")
    with pytest.raises(UserError) as error:
        check_known(tokenizer, ["the house", "ein kleines Haus"], "words.json")
    assert str(error.value) == ("The tokenizer 'words.json' does not know this corpus: 60% of its tokens are '<unk>'.")


def test_a_tokenizer_is_trained_once(tmp_path):
    texts, file = ["ein Haus", "zwei Häuser", "ein Haus"] * 5, tmp_path / "tokenizer.json"
    first = train_tokenizer(texts, 300, cache_file=file)
    again = train_tokenizer(iter([]), 300, cache_file=file)  # there is nothing to read
    assert again.get_vocab() == first.get_vocab() and len(first) > 260
    assert again("zwei Häuser").input_ids == first("zwei Häuser").input_ids
    assert again("Haus").input_ids[-1] == again.eos_token_id
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["", '{"version": "1.0", "trunc'])
def test_a_torn_cache_is_written_again(tmp_path, text):
    cache = tmp_path / "tokenizer.json"
    cache.write_text(text)
    vocabulary = train_tokenizer(["a cat"] * 5, 300, cache_file=cache).get_vocab()
    assert vocabulary == train_tokenizer(["a cat"] * 5, 300).get_vocab()
    assert train_tokenizer([], 300, cache_file=cache).get_vocab() == vocabulary
