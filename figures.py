"""What all figures share: one colour a method, one size of type, files that are never half-written."""
import io
from pathlib import Path

from cli import write_atomically

# One colour a sampler in every figure; distinct also without colour vision (Okabe and Ito).
COLOURS = {"random": "#555555", "osgd": "#E69F00", "osgd-replacement": "#CC79A7", "spectral": "#0072B2",
           "refined": "#009E73"}


def canvas(rows: int, columns: int, width: float, height: float, **options):
    """A figure of width x height inches and its axes [rows, columns]; drawn without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 8, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2, "pdf.fonttype": 42})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def save(figure, path: Path) -> None:
    """Write path.png and path.pdf, and let the figure go."""
    import matplotlib.pyplot as plt
    for kind in ("png", "pdf"):
        figure.savefig(buffer := io.BytesIO(), dpi=160, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(Path(f"{path}.{kind}"), buffer.getbuffer())
    plt.close(figure)
