"""A slice through the simplex of more than three distributions: the surrogate's mean over three of them."""

import plotly.graph_objects as go

from dem_opt.dashboards.simplex_map import objective_axis
from dem_opt.dashboards.style import finish, label, objective_words, say_nothing, told
from dem_opt.dashboards.surrogate_marks import diamond, draw_belief
from dem_opt.types import Summary


def surrogate_map(summary: Summary) -> go.Figure:
    """The surrogate's mean over the three distributions of which its optimum has most, the others as they are there."""
    believed = summary.surrogate
    if believed is None or len(believed.names) != 3:
        figure = go.Figure()
        say_nothing(figure, "no surrogate, or fewer than three distributions")
        return finish(figure, "Surrogate", "Nothing to draw.", "Nothing to draw.", 450)
    corners = dict(zip("abc", believed.names, strict=True))
    optimum = believed.optimum.weights
    figure = go.Figure()
    draw_belief(figure, believed, corners)
    figure.data[0].marker.opacity = 0.9
    at = {corner: [optimum[name]] for corner, name in corners.items()}
    figure.add_scatterternary(**at, cliponaxis=False, **diamond(believed))
    total = sum(optimum[name] for name in believed.names)
    frame = {"sum": total, "bgcolor": "rgba(0,0,0,0)", "domain": {"x": [0.08, 0.92]}}
    axes = {f"{corner}axis": {"title": {"text": label(name)}, "nticks": 5} for corner, name in corners.items()}
    figure.update_layout(ternary={**frame, **axes}, coloraxis=objective_axis(summary, believed.means))
    what = objective_words(summary)
    found = f"{believed.mean:.4f} ± {believed.deviation:.4f} nats per token at {told(believed.optimum)}"
    reading = (
        f"The {what} that a Gaussian process, fitted to {believed.trials} trials, expects where these three share "
        f"{total:.3f} and the others keep their coefficients of its optimum, the open diamond. An estimate: nothing "
        "here was scored."
    )
    return finish(figure, "What the surrogate believes", reading, f"The surrogate's optimum: {found}.", 450)
