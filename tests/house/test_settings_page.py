"""docs/settings.md: every setting of a config, as it is declared."""

from configs import digits
from diffjax import config_files, settings
from tests.pages.settings import AGAIN, PAGE, _of_group, page


def test_the_page_is_what_the_declarations_say():
    assert PAGE.read_text("utf-8").splitlines() == page().splitlines(), AGAIN


def test_every_setting_of_every_config_has_a_meaning():
    rows = list(_of_group(settings.Settings, digits.get_config(), "config"))
    assert [name for name, _, _, about in rows if not about] == []


def test_every_flag_of_a_config_is_on_the_page():
    text = PAGE.read_text("utf-8")
    flags = [name for name in config_files.settings(digits.get_config()) if "_target_" not in name]
    assert len(flags) > 100
    missing = {name for name in flags if not any(f"| `{x}` |" in text for x in _ends(name))}
    assert missing == set(), AGAIN


def _ends(name):
    return name, name.rpartition(".")[2]
