"""A parallel corpus that needs no network, made from Unicode CLDR as Babel carries it.

CLDR records how each language writes dates, times, numbers, money, units and time spans, and what it calls the
territories, languages, months and weekdays. Saying one thing in two languages gives a pair of sentences:

    March 3, 2021            ->  3. März 2021
    5 hours                  ->  5 Stunden
    France, Peru, and Japan  ->  Frankreich, Peru und Japan

A kind of sentence draws something to say and returns its forms, the ways to say it: functions from a locale to text.
Where two forms read the same in the source language, the first stands: "May 3, 2021" is the long date and also the
abbreviated one, which other languages write differently.
"""

import datetime
import math
import random
from collections.abc import Callable
from decimal import Decimal
from functools import partial

from babel import Locale, UnknownLocaleError
from babel.dates import TIMEDELTA_UNITS, format_date, format_skeleton, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal, format_percent, get_currency_precision
from babel.units import format_unit
from datasets import Dataset, DatasetDict, Features, Translation

from ...errors import UserError

_NOT_TERRITORIES = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ"}
_NAMES = {
    "territories": sorted({code for code in Locale("en").territories if code.isalpha()} - _NOT_TERRITORIES),
    "languages": sorted(code for code in Locale("en").languages if len(code) == 2),
    "months": range(1, 13),
    "days": range(7),
}
_CURRENCIES = ["AUD", "BRL", "CAD", "CNY", "EUR", "GBP", "ILS", "INR", "JPY", "KRW", "MXN", "NZD", "USD", "VND"]
_UNITS = {
    "duration": ["second", "minute", "hour", "day", "week", "month", "year"],
    "length": ["millimeter", "centimeter", "meter", "kilometer", "inch", "foot", "mile"],
    "mass": ["gram", "kilogram", "pound"],
    "volume": ["milliliter", "liter"],
    "area": ["square-meter", "square-kilometer"],
    "temperature": ["celsius", "fahrenheit"],
    "speed": ["kilometer-per-hour", "mile-per-hour"],
    "energy": ["kilowatt-hour"],
    "digital": ["megabyte", "gigabyte"],
}
_TIME_SPANS = [("year", "month", 12), ("day", "hour", 24), ("hour", "minute", 60), ("minute", "second", 60)]

_Form = Callable[..., str]


def _dates(rng: random.Random) -> list[_Form]:
    day = _draw_day(rng)
    styles = [partial(format_date, day, style) for style in ("long", "full")]
    return styles + [partial(format_skeleton, s, day) for s in ("MMMMd", "yMMMM", "yMMMd", "yMMMEd", "yMd")]


def _times(rng: random.Random) -> list[_Form]:
    time = _draw_time(rng)
    return [partial(format_time, time, style) for style in ("short", "medium")]


def _dates_with_times(rng: random.Random) -> list[_Form]:
    day, time = _draw_day(rng), _draw_time(rng)

    def form(locale: Locale) -> str:
        pattern = locale.datetime_formats["long"].replace("'", "")
        return pattern.format(format_time(time, "short", locale=locale), format_date(day, "long", locale))

    return [form]


def _money(rng: random.Random) -> list[_Form]:
    currency = rng.choice(_CURRENCIES)
    decimals = get_currency_precision(currency)
    amount = Decimal(rng.randrange(10**decimals, 10 ** (rng.randint(1, 6) + decimals))).scaleb(-decimals)
    return [partial(format_currency, amount, currency, format_type=style) for style in ("name", "standard")]


def _numbers(rng: random.Random) -> list[_Form]:
    return [partial(format_decimal, Decimal(rng.randrange(10 ** rng.randint(3, 6))) / rng.choice([1, 10, 100]))]


def _percents(rng: random.Random) -> list[_Form]:
    return [partial(format_percent, Decimal(rng.randint(1, 1_000)) / 1_000, decimal_quantization=False)]


def _quantities(rng: random.Random) -> list[_Form]:
    unit = rng.choice([f"{family}-{unit}" for family, units in _UNITS.items() for unit in units])
    quantity = Decimal(rng.randint(1, 999)) / rng.choice([1, 1, 10])
    return [partial(format_unit, quantity, unit, length) for length in ("long", "short")]


def _time_spans(rng: random.Random) -> list[_Form]:
    large, small, ratio = rng.choice(_TIME_SPANS)
    parts = [(rng.randrange(1, 60), f"duration-{large}"), (rng.randrange(1, ratio), f"duration-{small}")]
    return [lambda locale: format_list([format_unit(*part, locale=locale) for part in parts], locale=locale)]


def _relative_times(rng: random.Random) -> list[_Form]:
    unit, seconds = rng.choice(TIMEDELTA_UNITS)
    delta = datetime.timedelta(seconds=seconds * rng.randrange(1, 100) * rng.choice([-1, 1]))
    return [partial(format_timedelta, delta, unit, threshold=math.inf, add_direction=True)]


def _name_lists(rng: random.Random) -> list[_Form]:
    (field,) = rng.choices(list(_NAMES), [len(codes) for codes in _NAMES.values()])
    codes = rng.sample(_NAMES[field], rng.choice([2, 2, 3]))

    def form(style: str, locale: Locale) -> str:
        return format_list([_name(field, code, locale) for code in codes], style, locale)

    return [partial(form, style) for style in ("standard", "or")]


_KIND_WEIGHTS = {
    _dates: 6,
    _times: 2,
    _dates_with_times: 2,
    _money: 4,
    _numbers: 1,
    _percents: 1,
    _quantities: 5,
    _time_spans: 1,
    _relative_times: 1,
    _name_lists: 8,
}


def build_cldr_corpus(
    source_lang: str = "en",
    target_lang: str = "de",
    seed: int = 0,
    train_size: int = 24_000,
    validation_size: int = 500,
    test_size: int = 500,
) -> DatasetDict:
    """Makes a corpus of short sentence pairs from Unicode CLDR through Babel.

    The pairs depend on the arguments and the CLDR data of the installed Babel alone. Every space is the plain one: the
    no-break and narrow spaces that CLDR writes before units, signs and "PM" are replaced in both languages, so that
    text typed on a keyboard matches. A territory or language that CLDR does not name in a language stays its code.

    Args:
        source_lang, target_lang: Codes such as "en" or "pt-PT".
        train_size: Number of training pairs, among them every territory, language, month and weekday on its own.

    Returns:
        The splits "train", "validation" and "test" with the one column `translation`: a dictionary from each of the
        two language codes to a string. No source sentence occurs twice in the corpus.

    Raises:
        UserError: if CLDR lacks a language.
    """
    source, target = _parse_locale("source_lang", source_lang), _parse_locale("target_lang", target_lang)

    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    for field, codes in _NAMES.items():
        for code in codes:
            pairs.setdefault(*_write_pair([partial(_name, field, code)], rng, source, target))
    names = len(pairs)
    while len(pairs) < train_size + validation_size + test_size:
        (kind,) = rng.choices(list(_KIND_WEIGHTS), _KIND_WEIGHTS.values())
        pairs.setdefault(*_write_pair(kind(rng), rng, source, target))

    rows = [{source_lang: sentence, target_lang: translation} for sentence, translation in pairs.items()]
    drawn, held_out = rows[names:], validation_size + test_size
    rng.shuffle(drawn)
    train = rows[:names] + drawn[held_out:]
    rng.shuffle(train)
    splits = {"train": train, "validation": drawn[:validation_size], "test": drawn[validation_size:held_out]}
    features = Features({"translation": Translation([source_lang, target_lang])})
    return DatasetDict({name: Dataset.from_dict({"translation": part}, features) for name, part in splits.items()})


def _parse_locale(field: str, language: str) -> Locale:
    try:
        return Locale.parse(language.replace("-", "_"))
    except (UnknownLocaleError, ValueError) as error:
        raise UserError(f"CLDR has no language {language!r}: set {field} to a code such as 'en' or 'de'.") from error


def _draw_day(rng: random.Random) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_525))


def _draw_time(rng: random.Random) -> datetime.time:
    return datetime.time(rng.randrange(24), rng.randrange(60), rng.randrange(60))


def _name(field: str, code: str | int, locale: Locale) -> str:
    names = getattr(locale, field)
    return names.get(code, code) if field in ("territories", "languages") else names["stand-alone"]["wide"][code]


def _write_pair(forms: list[_Form], rng: random.Random, source: Locale, target: Locale) -> tuple[str, str]:
    sentence = _write(rng.choice(forms), source)
    form = next(form for form in forms if _write(form, source) == sentence)
    return sentence, _write(form, target)


def _write(form: _Form, locale: Locale) -> str:
    return " ".join(form(locale=locale).split())
