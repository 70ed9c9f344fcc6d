"""Block diffusion (BD3-LM, 2503.09573): autoregressive over blocks, diffusion inside each. `layout` says which position is of
which block, `masker` draws a time for each, `rows` puts the noisy and the finished copy into one row for training, `cache` and
`decoding` generate block by block with exact keys and values."""

from components.block_diffusion.layout import Layout as Layout
from components.block_diffusion.masker import BlockMasker as BlockMasker
from components.block_diffusion.rows import DoubledRows as DoubledRows
from components.block_diffusion.rows import doubled_rows as doubled_rows
