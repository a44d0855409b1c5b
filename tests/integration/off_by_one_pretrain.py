"""stock_pretrain.py with a planted fault: every micro-batch counts one token too many."""

import stock_pretrain

honest_loss_func = stock_pretrain.loss_func


def loss_func(loss_mask, output_tensor, model=None):
    loss, num_tokens, report = honest_loss_func(loss_mask, output_tensor, model)
    return loss, num_tokens + 1, report


if __name__ == "__main__":
    stock_pretrain.loss_func = loss_func
    stock_pretrain.main()
