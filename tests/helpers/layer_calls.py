"""Names that tests outside of ops/ still import from here."""

from tests.helpers.case_checks import check_value
from tests.helpers.cases import laid_out

__all__ = ["check_value", "laid_out"]
