"""How legible a colour is."""


def rgb(colour):
    """(red, green, blue) of #rrggbb or of a browser's rgb(...)."""
    if colour.startswith("#"):
        return tuple(bytes.fromhex(colour[1:]))
    return tuple(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def contrast(one, other):
    """The contrast ratio of two colours (WCAG 2.2): 1 to 21."""
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
