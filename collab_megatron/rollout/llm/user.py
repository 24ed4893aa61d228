"""The simulated user: an LLM that knows the whole task and plays the person who wants it done.

The LLM gets the chat as JSON lines inside one prompt, not as chat turns. In chat turns the simulator would have to
write the user's lines as "assistant", and models that were trained as assistants fall back into that role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from collab_megatron.config.roles import USER_OF, as_user
from collab_megatron.config.sections import EvaluationSection, SimulatorsSection, UserSection
from collab_megatron.rollout.llm.gateway import Gateway
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.parsing import json_object, object_schema, text_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import TERMINATION_SIGNAL, ChatLLM, LLMRequest, Message, Task

NO_DESCRIPTION = "Getting help from an assistant in a chat."
USER_TURN_SCHEMA = object_schema(thought="string", response="string")


class LLMUserSimulator:
    """Implements types.UserSimulator and first_turns.UserTurnsTogether, for one model or a mixture of them."""

    def __init__(
        self,
        user: UserSection,
        llm: ChatLLM,
        *,
        part: Callable[[int], int] = lambda sample_index: 0,
        together: Callable[[int], bool] = lambda part: False,
        health: SimulatorHealth | None = None,
    ) -> None:
        """`part`: which simulator of a mixture answers for a sample index: 0 is `user` itself, then its `mixture` in
        order. `together`: whether a simulator takes requests for several turns. Raises UserError if a prompt file
        cannot be used."""
        self._llm = llm
        self._templates = [
            load_template(
                "user", section.prompt_file, required=("request", "chat"), optional=("task_desc", "termination_signal")
            )
            for section in (user, *user.mixture)
        ]
        self._part = part
        self._together = [together(number) for number in range(len(self._templates))]
        self._health = health
        self._signal = user.termination_signal

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """The next user turn (the opening, if `chat` has no turns), with the termination signal if it ends the chat.

        Waits for one LLM call. Raises SimulatorError.
        """
        (text,) = await self.replies(task, chat, sample_indices=(sample_index,))
        return text

    def request_of(self, sample_index: int) -> int | None:
        """The simulator of the mixture, if it takes requests for several turns."""
        part = self._part(sample_index)
        return part if self._together[part] else None

    async def replies(self, task: Task, chat: Sequence[Message], *, sample_indices: Sequence[int]) -> list[str]:
        """The next user turn of each sample, in one call for all; the samples have the same simulator.

        Waits for one LLM call. Raises SimulatorError.
        """
        prompt = self._templates[self._part(sample_indices[0])].fill(
            # on one line: it stands outside the blocks, where a dataset's text could begin one
            task_desc=" ".join(task.task_desc.split()) or NO_DESCRIPTION,
            request=task.single_turn_prompt,
            chat=chat_lines(chat),
            termination_signal=self._signal,
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_user_turn,
            sample_index=sample_indices[0],
            n=len(sample_indices),
            json_reply=True,
            schema=USER_TURN_SCHEMA,
        )
        texts = await self._llm.complete(request)
        if self._health is not None:
            for text in texts:
                self._health.observe_turn("user", task, chat, text, signal=self._signal)
        return texts


def user_simulator(
    simulators: SimulatorsSection, gateway: Gateway, health: SimulatorHealth | None = None
) -> LLMUserSimulator:
    """The simulated user of a config. Raises UserError for a prompt file that cannot be used."""
    return LLMUserSimulator(
        simulators.user,
        gateway.role("user"),
        part=partial(gateway.part, "user"),
        together=partial(gateway.together, "user"),
        health=health,
    )


def evaluation_users(
    simulators: SimulatorsSection,
    evaluation: EvaluationSection,
    gateway: Gateway,
    health: SimulatorHealth | None = None,
) -> dict[str, LLMUserSimulator]:
    """The simulated users of an evaluation: that of the config as "", and the further ones. Raises UserError as
    `user_simulator` does."""
    if evaluation.mixture:
        own = user_simulator(simulators, gateway, health)
    else:
        alone = simulators.user.model_copy(update={"mixture": ()})
        own = LLMUserSimulator(alone, gateway.role("user", 0), health=health)
    signal = simulators.user.termination_signal
    # the manners of further users may be odd on purpose: the health check, which may stop a run, does not see them
    further = {
        name: LLMUserSimulator(as_user(section, signal), gateway.role(f"{USER_OF}{name}"))
        for name, section in evaluation.users.items()
    }
    return {"": own, **further}


def read_user_turn(text: str) -> str:
    """The `response` of a simulator's reply; its `thought` goes no further. Raises MalformedReply."""
    return text_field(json_object(text), "response")


def ends_chat(text: str, signal: str = TERMINATION_SIGNAL) -> bool:
    """Whether a user turn ends the conversation."""
    return signal in text
