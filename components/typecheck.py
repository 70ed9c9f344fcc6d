"""beartype as PEP 484 has it: an int may stand where a float is asked for."""

from typing import Any

from beartype import BeartypeConf, beartype

check: Any = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a decorator
