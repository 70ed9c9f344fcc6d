"""Which sampler, how many steps, how much guidance? `sweep` keeps the settings that were tried, `figures` draws them, and
`question` concludes."""

from mdm.studies.inference.question import cells as cells
from mdm.studies.inference.question import conclude as conclude
from mdm.studies.inference.question import draw as draw
