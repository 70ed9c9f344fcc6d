"""Which order of generation? `measures` asks finished runs, `question` concludes, and `figures` draws what it found."""

from mdm.studies.orders.figures import draw as draw
from mdm.studies.orders.question import conclude as conclude
