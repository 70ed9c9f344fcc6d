"""Configs: read and merged (settings), built (component), by which names (names), what travels (trust); and recipes by name."""

from mdm.config.component import check as check
from mdm.config.component import hints_of as hints_of
from mdm.config.component import instantiate as instantiate
from mdm.config.component import locate as locate
from mdm.config.errors import UserError as UserError
from mdm.config.errors import one_line as one_line
from mdm.config.errors import read_json as read_json
from mdm.config.errors import reason as reason
from mdm.config.files import carried as carried
from mdm.config.files import find_config as find_config
from mdm.config.files import layers as layers
from mdm.config.files import names_modules as names_modules
from mdm.config.files import read_yaml as read_yaml
from mdm.config.files import recipe_root as recipe_root
from mdm.config.settings import WORDS as WORDS
from mdm.config.settings import at_least as at_least
from mdm.config.settings import at_least_one as at_least_one
from mdm.config.settings import found_beside as found_beside
from mdm.config.settings import load as load
from mdm.config.settings import refuse_nan as refuse_nan
