"""llama.cpp (package xllamacpp) in a process of its own, which imports nothing else."""

import multiprocessing


def llama_cpp(path, max_new_tokens, threads, draft=None, gamma=0):
    """A compiled program: function(prompt ids) -> (text, None). It counts its tokens itself.

    Its process sleeps until it is asked. In this process, the OpenMP library that both share would
    count its threads together with torch's. That is more threads than cores, so the library would
    let them sleep between two operations, and every small operation would cost more.
    """
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, str(path), draft and str(draft), gamma, threads), daemon=True)
    server.start()
    there.close()

    def run(ids):
        try:
            if not server.is_alive():      # files.run lets a write to a closed pipe end the program
                raise EOFError
            here.send({"prompt": ids, "n_predict": max_new_tokens, "temperature": 0,
                       "cache_prompt": False})
            said = here.recv()
        except EOFError:
            raise ValueError("llama.cpp's process has ended, for the reason above; without "
                             "xllamacpp its rows are left out") from None
        if "choices" not in said:
            raise ValueError(f"llama.cpp refused the prompt: {said}")
        usage, drafted = said["usage"], said["timings"].get("draft_n_accepted", 0)
        return Text(said["choices"][0]["text"], usage["completion_tokens"], usage["prompt_tokens"],
                    drafted), None
    return run


def serve(connection, path, draft, gamma, threads):
    """The other process: answers requests until the first one hangs up."""
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = path, 2048, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    if draft:
        kinds, ours = xllamacpp.common_speculative_type, settings.speculative
        ours.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        ours.draft.mparams.path, ours.draft.n_max = draft, gamma
        ours.draft.cpuparams.n_threads = ours.draft.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    try:
        while True:
            connection.send(server.handle_completions(connection.recv()))
    except EOFError:
        pass


class Text(str):
    """A text, the numbers of its tokens, of its prompt's, and of the drafter's that were kept."""

    def __new__(cls, text, count, prompt_tokens, drafted):
        self = super().__new__(cls, text)
        self.count, self.prompt_tokens, self.drafted = count, prompt_tokens, drafted
        return self
