"""Numbers by name on the command line: code=.3,math=.7 ."""

from pathlib import Path

from dem_opt.errors import InputError
from dem_opt.json_files import read_json
from dem_opt.simplex import UNIT, Coefficients


def parse_numbers(text: str, option: str) -> dict[str, float]:
    """Numbers by name from code=.3,math=.7 .

    Raises:
        InputError: A part is not a name, an equals sign and a number, or a name is given twice.
    """
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(None, option, text, f"{part!r} is not NAME=NUMBER; write code=.3,math=.7")
        if name in numbers:
            raise InputError(None, option, text, f"{name!r} is given twice")
        numbers[name] = value
    return numbers


def read_coefficients(text: str, option: str) -> dict[str, float] | dict[str, dict[str, float]]:
    """Coefficients by distribution from code=.3,math=.7 , or from a JSON file, which may have them by group too.

    Raises:
        InputError: The text is neither, or the file holds something else.
    """
    file = Path(text)
    if "=" in text or not (file.suffix or file.exists()):
        return parse_numbers(text, option)
    mend = "write {code: number, ...}, or such coefficients by group, in JSON"
    content = read_json(file, dict[str, float | dict[str, float]], option, mend)
    groups = {name: row for name, row in content.items() if isinstance(row, dict)}
    numbers = {name: row for name, row in content.items() if not isinstance(row, dict)}
    if groups and numbers:
        raise InputError(file, option, next(iter(numbers)), "stands beside groups; write it under `global`")
    return groups or numbers


def format_coefficients(coefficients: Coefficients) -> str:
    """Coefficients as --coefficients takes them, exactly; zeros are left out."""
    used = {name: units for name, units in coefficients.pairs if units} or dict(coefficients.pairs[:1])
    return ",".join(f"{name}={units / UNIT:.9f}".rstrip("0").rstrip(".") for name, units in used.items())
