"""Dropout that is computed again where it is needed rather than kept: whether a value stays is a function of a seed and
of the value's position, the same one in every implementation of a skip connection.

Value i of the flattened tensor stays where u(seed, i) >= p, and is divided by 1 - p there. u is the float32 in [0, 1)
that `tl.rand(seed, i)` of Triton makes of the first word of Philox 4x32 with 10 rounds, whose key is the seed and whose
counter is i. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
(https://doi.org/10.1145/2063384.2063405).
"""

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
TO_UNIFORM = 4.6566127342e-10
"""A little less than 2^-31, so that the largest product is less than 1 in float32."""


def draw_seed(device: torch.device) -> torch.Tensor:
    """64 random bits of torch's default generator, `()`, int64."""
    return torch.randint(-(2**63), 2**63 - 1, (), device=device)


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10 of four words of counter and two of key, int64 with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64, whatever the sign
        c0, c1, c2, c3 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD, (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def philox_uniform(seed: torch.Tensor, count: int) -> torch.Tensor:
    """u(seed, i) for i = 0 ... count - 1, `(count,)`, float32."""
    position = torch.arange(count, device=seed.device)
    zero = torch.zeros_like(position)
    word, *_ = philox4x32((position & WORD, position >> 32, zero, zero), (seed & WORD, seed >> 32 & WORD))
    return torch.where(word > WORD // 2, WORD - word, word).float() * TO_UNIFORM


def keep_factors(seed: torch.Tensor, dropout: float, like: torch.Tensor) -> torch.Tensor:
    """What dropout multiplies a tensor of the shape of `like` with: 0 or 1 / (1 - p), in float32 at least."""
    kept = philox_uniform(seed, like.numel()).view(like.shape) >= dropout
    return kept.to(torch.promote_types(like.dtype, torch.float32)) / (1 - dropout)
