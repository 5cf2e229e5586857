r"""The frozen feedforward pass: which feedforward quantities (1) and (2) keep while the states relax.

    (1)  dx^l/dt = −x^l + W^{lT} ( f'(W^l x̄^l) ⊙ x^{l+1} )
                                   └────┬────┘
                              relaxation_derivative
    (2)  ∂L/∂W^l = ( f'(W^l x̄^l) ⊙ x^{l+1} ) x̄^{lT}
                     └────┬────┘             └─┬─┘
                   update_derivative     update_activity

A brain would have to store x̄ over the relaxation phase for each of them. Unfrozen, a quantity is taken at the current
activity, ``x̄^l → x^l``. The paper unfreezes one at a time, and reports (results/ has what this project measured):

    a   relaxation_derivative=False                            keeps performance
    b   update_derivative=False                                keeps performance
    c   relaxation_derivative=False, update_derivative=False   keeps performance
    d   update_activity=False                                  destroys it

On any graph the derivative is the Jacobian of a vertex by the vertices that it reads (with everything in it, such as
the choice that a max-pooling makes), and the activity is what a layer, a module with parameters of its own, reads. To
take them at the current states the model's forward pass is run again with every vertex set to its state.
Source: Millidge et al., arXiv 2010.06219, section 4.1 and Figures 1 and 3.

May import: nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Frozen:
    """What stays as the feedforward pass left it: each True is frozen (the default), each False taken at the states.

    Args:
        relaxation_derivative: f' in equation (1). Unfrozen, the relaxation is not linear: only `Euler` and `Continuous`
            solve it. Each step takes the Jacobians once, at the states that the step starts from.
        update_derivative: f' in equation (2), at the end of the relaxation phase if unfrozen.
        update_activity: the presynaptic activity x̄^l in equation (2), likewise.
        input: the input. Unfrozen, it relaxes like any vertex, from the data on, as in the authors' code for d: a
            setting for tests of the paper, since no brain can relax the world. It needs one of the others unfrozen, and
            means every argument of floating-point numbers.

    Generators, buffers, plain attributes, autocast and the training mode are the feedforward pass's own in every later
    run of the model. What is out of reach (a closure, a generator outside of the model) is noticed in the first pass of
    a setting where it changes an activity, and refused.

    Raises:
        TypeError: if a value is neither True nor False.
        ValueError: if only ``input`` is unfrozen, which would change no gradient.
    """

    relaxation_derivative: bool = True
    update_derivative: bool = True
    update_activity: bool = True
    input: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}")
        if not self.input and self.relaxation_derivative and self.update_derivative and self.update_activity:
            raise ValueError(
                "input=False has no effect while everything else is frozen, as nothing reads the relaxed input: set "
                "relaxation_derivative, update_derivative or update_activity to False, or leave it out"
            )

    @property
    def splits_update(self) -> bool:
        """Whether the two factors of (2) are taken at different activities."""
        return self.update_derivative != self.update_activity


ALL_FROZEN = Frozen()
