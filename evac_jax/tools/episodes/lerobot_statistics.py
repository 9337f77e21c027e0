"""Statistics of a LeRobot dataset's features, by which its policies normalise (meta/stats.json)."""

from collections.abc import Iterable, Mapping

import numpy as np


class Statistics:
    """Minimum, maximum, mean, standard deviation and count of features, episode by episode.

    Args:
        names: of the features.
    """

    def __init__(self, names: Iterable[str]):
        self._parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in names}

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Count an episode's values, {feature: numbers [N] or [N D]}; a picture is N pixels."""
        for name, array in values.items():
            numbers = array.reshape(len(array), -1).astype(np.float64)
            mean = numbers.mean(0)
            spread = ((numbers - mean) ** 2).sum(0)
            count = np.array(len(numbers))
            self._parts[name].append((numbers.min(0), numbers.max(0), mean, spread, count))

    def as_json(self) -> dict[str, dict[str, list]]:
        """Return {feature: {"min": .., "max": .., "mean": .., "std": .., "count": ..}}.

        Three channels of a picture are [3 1 1], as LeRobot broadcasts them.
        """
        result = {}
        for name, parts in self._parts.items():
            low, high, means, spreads, counts = (
                np.stack(part) for part in zip(*parts, strict=True)
            )
            total = counts.sum()
            mean = (means * counts[:, None]).sum(0) / total
            # Chan et al. 1979: sums of squares of parts, and of their means around the whole's.
            spread = spreads.sum(0) + ((means - mean) ** 2 * counts[:, None]).sum(0)
            figures = {"min": low.min(0), "max": high.max(0), "mean": mean}
            figures["std"] = np.sqrt(spread / total)
            if name.startswith("observation.images."):
                figures = {k: figure.reshape(-1, 1, 1) for k, figure in figures.items()}
            result[name] = {k: figure.tolist() for k, figure in figures.items()}
            result[name]["count"] = [int(total)]
        return result
