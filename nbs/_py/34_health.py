# %% [markdown]
# # Health of the pseudo labels {#sec-health}
#
# > Know whether the teacher teaches anything, while it does.
#
# Semi-supervised training fails silently. With a threshold too high the teacher labels nothing, the unsupervised loss is a small number that looks like success, and a day later the result equals the supervised one. With a threshold too low the student learns its own mistakes. Both are plain to see if somebody looks: this chapter looks.

# %%
#| default_exp health

# %%
#| export
from collections import deque
from semidetr.metrics import pseudo_quality


# %% [markdown]
# ## What is watched
#
# The labels of the unlabelled images, where a data set has them, never reach the method. The monitor may look at them: it matches each pseudo box to the truth (IoU 0.5, same class) and reports precision and recall over a window of steps. It also compares the number of pseudo boxes an image with the number of true boxes a labelled image. Without any pseudo label for a whole window it warns, loudly, and says what can be done.

# %%
#| export
class HealthMonitor:
    "Pseudo labels of the last `window` steps against labelled images and hidden truth"
    def __init__(self, truth=None, window:int=200, device='cpu'):
        self.truth, self.window, self.warned = truth, window, False
        self.rows = deque(maxlen=window)

    def add(self,
        stats:dict, # of a method
    ):
        "Count one step; returns a warning or None"
        if 'pseudo' not in stats: return None
        tp = n_pred = n_gt = 0
        for p in stats['pseudo']:
            if self.truth is None or not getattr(self.truth, 'has_boxes', False): break
            a = self.truth.annotation(self.truth.index_of(p['image_id']))
            ok = ~a['ignore']
            t, n, g = pseudo_quality(p['boxes'], p['labels'], a['boxes'][ok], a['labels'][ok])
            tp, n_pred, n_gt = tp+int(t), n_pred+int(n), n_gt+int(g)
        self.rows.append((stats['pseudo_boxes'], stats['labelled_boxes'], stats['pseudo_score'], stats['empty_images'], tp, n_pred, n_gt, stats['top_score']))
        if len(self.rows) == self.window and not self.warned and all(r[0] == 0 for r in self.rows):
            self.warned = True
            return (f'no pseudo label in {self.window} iterations (best score of the teacher: {self.rows[-1][7]:.2f}): the unlabelled images '
                    'teach nothing. Lower pseudo.threshold, lengthen method.burn_in, or check that both data sets show the same things.')
        return None

    def summary(self)->dict: # means over the window; precision and recall only where the truth is known
        "What to log"
        if not self.rows: return {}
        mean = lambda i: sum(r[i] for r in self.rows)/len(self.rows)
        tp, n_pred, n_gt = (sum(r[i] for r in self.rows) for i in (4, 5, 6))
        out = dict(pseudo_boxes=mean(0), labelled_boxes=mean(1), pseudo_score=mean(2), empty_images=mean(3))
        if n_gt: out |= dict(pseudo_precision=tp/n_pred if n_pred else float('nan'), pseudo_recall=tp/n_gt)
        return out

    def state_dict(self): return dict(rows=[list(r) for r in self.rows], warned=self.warned)
    def load_state_dict(self, s): self.rows.extend(tuple(r) for r in s['rows']); self.warned = s['warned']
