"""From texts to conditions: tokenizers, text encoders and combinations of them, prompts.

encoder = read_text_encoder("FOLDER")       texts -> states, mask and pooled vector
condition = prompts(encoder)                a kind of condition that parses texts
"""

from diffjax.text.combined import AlongFeatures as AlongFeatures
from diffjax.text.combined import AlongTokens as AlongTokens
from diffjax.text.combined import PooledFrom as PooledFrom
from diffjax.text.combined import Zeros as Zeros
from diffjax.text.encoders import FolderEncoder as FolderEncoder
from diffjax.text.encoders import TextEncoder as TextEncoder
from diffjax.text.encoders import read_text_encoder as read_text_encoder
from diffjax.text.prompts import Prompts as Prompts
from diffjax.text.prompts import prompts as prompts
from diffjax.text.tokenizers import Tokenizer as Tokenizer
from diffjax.text.tokenizers import read_tokenizer as read_tokenizer
