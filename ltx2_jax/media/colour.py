"""What the colours of a video file mean, and their way to SDR in BT.709.

The codes are those of ITU-T H.273, which libav uses too. The white of SDR is light of 1.0.

HDR becomes SDR by published rules alone. PQ and HLG become light as ITU-R BT.2100 says, HLG on its
nominal display of 1000 cd/m2. The EETF of ITU-R BT.2390 (5.4.1), applied to the largest of R, G and
B, rolls 1000 cd/m2 off to 203 cd/m2, the reference white of ITU-R BT.2408, which becomes the white
of SDR; up to 88 cd/m2 nothing changes. One rule for all clips, whatever display their film was
graded on, so that the same light is the same colour in all of them.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ltx2_jax.errors import UserError

HDR_PEAK, SDR_WHITE = 1000.0, 203.0  # cd/m2
DISPLAY_GAMMA = 2.4  # ITU-R BT.1886, with a black of zero
CONVERTED_HDR = "converted from HDR (PQ or HLG) to SDR by BT.2390"
CONVERTED_GAMUT = "converted from other primaries (such as BT.2020 or P3) to BT.709"

UNSPECIFIED, BT709, BT2020 = 2, 1, 9
PQ, HLG = 16, 18
# Those of camera and display gammas that a display shows alike, near enough: their values stay.
SDR_TRANSFERS = {0, 1, UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15}
OTHER_TRANSFERS = {8: "linear light", 9: "logarithmic", 10: "logarithmic", 17: "digital cinema"}
# Matrices that libav's scaler knows. 0 is RGB itself.
KNOWN_MATRICES = {0, 1, UNSPECIFIED, 3, 4, 5, 6, 7, BT2020}
# Primaries whose colours are visibly others than those of BT.709: x and y of red, green, blue and
# white. Those of PAL and of SMPTE C (5, 6, 7, 22) are so near that players leave them, and we do.
CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),
    4: ((0.670, 0.330), (0.210, 0.710), (0.140, 0.080), (0.310, 0.316)),  # NTSC of 1953
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), (0.310, 0.316)),  # film
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),  # Display P3
}
NEAR_PRIMARIES = {0, UNSPECIFIED, 5, 6, 7, 22}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """From a file's RGB to SDR in BT.709. transfer: PQ, HLG or BT709. primaries: a code."""

    transfer: int
    primaries: int

    @property
    def note(self) -> str:
        """What is said of a clip that went through it."""
        return CONVERTED_GAMUT if self.transfer == BT709 else CONVERTED_HDR

    def __call__(
        self,
        rgb: np.ndarray,  # uint16 [H, W, 3], full range
    ) -> np.ndarray:  # uint8 [H, W, 3]
        """Colours that BT.709 does not have are cut off at its bounds."""
        light = _to_light(self.transfer)[rgb]
        if self.transfer == HLG:
            light = hlg_display(light)
        if self.transfer in (PQ, HLG):
            peak = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
            light = light * (_rolled_off(peak) / peak / SDR_WHITE)
        if self.primaries != BT709:
            light = light @ to_bt709(self.primaries).T.astype(np.float32)
        encoded = np.clip(light, 0, 1) ** (1 / DISPLAY_GAMMA)
        return np.rint(encoded * 255).astype(np.uint8)


def conversion(primaries: int, transfer: int) -> Conversion | None:
    """What a picture of these codes must go through; None where its RGB can be taken as it is.

    Raises UserError for what cannot be turned into SDR by a published rule.
    """
    if transfer in (PQ, HLG):
        primaries = BT2020 if primaries in (0, UNSPECIFIED) else primaries
    elif transfer not in SDR_TRANSFERS:
        name = OTHER_TRANSFERS.get(transfer, f"code {transfer} of H.273")
        raise UserError(f"its transfer function ({name}) is not that of a picture to look at")
    if primaries not in CHROMATICITIES and primaries not in NEAR_PRIMARIES:
        raise UserError(f"its primaries (code {primaries} of H.273) are not known")
    primaries = BT709 if primaries in NEAR_PRIMARIES else primaries
    if transfer in (PQ, HLG):
        return Conversion(transfer, primaries)
    return None if primaries == BT709 else Conversion(BT709, primaries)


def matrix_of(matrix: int, primaries: int, transfer: int) -> int | None:
    """The code of the matrix to RGB that libav shall use; None leaves the choice to it.

    Where the file does not say it, that of the primaries is meant. Raises UserError for one that
    libav's scaler would silently take for another.
    """
    if matrix not in KNOWN_MATRICES:
        raise UserError(f"its matrix from RGB to YUV (code {matrix} of H.273) is not known")
    if matrix != UNSPECIFIED:
        return None
    if primaries in (BT709, BT2020):
        return primaries
    return BT2020 if transfer in (PQ, HLG) else None


# ---------------------------------------------------------------- BT.2100, BT.2390


def pq_light(code: np.ndarray) -> np.ndarray:
    """BT.2100 table 4, the EOTF of PQ: [0, 1] -> cd/m2, of any shape."""
    m1, m2, c1, c2, c3 = _PQ
    power = np.asarray(code, np.float64) ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def pq_code(light: np.ndarray) -> np.ndarray:
    """The inverse of `pq_light`."""
    m1, m2, c1, c2, c3 = _PQ
    power = (np.asarray(light, np.float64) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


_PQ = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def hlg_scene(code: np.ndarray) -> np.ndarray:
    """BT.2100 table 5, the inverse OETF of HLG: [0, 1] -> light of the scene in [0, 1]."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    code = np.asarray(code, np.float64)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def hlg_display(scene: np.ndarray) -> np.ndarray:  # [..., 3] -> [..., 3]
    """BT.2100 table 5, the OOTF of HLG on a display of 1000 cd/m2, whose gamma is 1.2: cd/m2."""
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], scene.dtype)
    return HDR_PEAK * np.maximum(luminance, 0)[..., None] ** 0.2 * scene


def eetf(code: np.ndarray, source_peak: float, target_peak: float) -> np.ndarray:
    """BT.2390 5.4.1 with blacks of zero: PQ code values for a display of `target_peak` cd/m2."""
    top = float(pq_code(source_peak))
    most = float(pq_code(target_peak)) / top
    knee = 1.5 * most - 0.5
    e1 = np.minimum(np.asarray(code, np.float64) / top, 1)
    t = np.maximum(e1 - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * most
    )
    return np.where(e1 < knee, e1, spline) * top


# ---------------------------------------------------------------- primaries


@functools.cache
def to_bt709(primaries: int) -> np.ndarray:  # [3, 3]
    """Light in these primaries to light in those of BT.709, whites onto each other (Bradford)."""
    source, target = (_to_xyz(CHROMATICITIES[code]) for code in (primaries, BT709))
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    whites = [bradford @ matrix.sum(axis=1) for matrix in (source, target)]
    adapted = np.linalg.inv(bradford) @ np.diag(whites[1] / whites[0]) @ bradford
    return np.linalg.inv(target) @ adapted @ source


def _to_xyz(points: tuple[tuple[float, float], ...]) -> np.ndarray:  # [3, 3]
    """RGB to CIE XYZ, from the chromaticities of red, green, blue and white."""
    columns = [(x / y, 1.0, (1 - x - y) / y) for x, y in points]
    colours, white = np.array(columns[:3]).T, np.array(columns[3])
    return colours * np.linalg.solve(colours, white)


# ---------------------------------------------------------------- tables


@functools.cache
def _to_light(transfer: int) -> np.ndarray:
    """float32 [65536]: 16-bit codes to cd/m2 (PQ), light of the scene (HLG), relative light."""
    code = np.arange(65536) / 65535
    curves = {PQ: pq_light, HLG: hlg_scene, BT709: lambda value: value**DISPLAY_GAMMA}
    return curves[transfer](code).astype(np.float32)


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """cd/m2 of any shape through the EETF, by a table of its values at 4097 PQ codes."""
    codes, ends = _roll_off_table()
    return np.interp(light, codes, ends).astype(np.float32)


@functools.cache
def _roll_off_table() -> tuple[np.ndarray, np.ndarray]:  # [4097], [4097], both in cd/m2
    codes = np.linspace(0, 1, 4097)
    return pq_light(codes), pq_light(eetf(codes, HDR_PEAK, SDR_WHITE))
