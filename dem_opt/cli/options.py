"""What stands on the command line, as values."""

from dem_opt.errors import InputError


def weights_of(text: str, option: str = "--weights") -> dict[str, float]:
    """Numbers by name from code=.3,math=.7 .

    Raises InputError for a part that is not a name, an equals sign and a number, and for a name given twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(None, option, text, f"{part!r} is not NAME=NUMBER; write code=.3,math=.7")
        if name in weights:
            raise InputError(None, option, text, f"{name!r} stands twice")
        weights[name] = weight
    return weights
